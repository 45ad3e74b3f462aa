"""The runner: all draws at once or one by one, computed once where they agree, and nothing left behind."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from pyrolora.guides.map import MAP
from pyrolora.inference.predict import (
    Runner,
    _by_length,
    likelihood_parameters,
    log_likelihood,
    log_probabilities,
    shared_prefix,
)
from pyrolora.inference.randomness import isolated
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.likelihoods.normal import Normal as NormalLikelihood
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from tests.conftest import Architecture
from tests.programs import (
    LinearModel,
    language_posterior,
    linear_gaussian,
    lora,
    sentence_task,
    tiny_bert,
    tiny_program,
)


def draws_of(program: PyroLoRA, num_draws: int, *, seed: int = 0) -> dict[str, Tensor]:
    with isolated(seed):
        return {name: 0.3 * torch.randn(num_draws, *latent.shape) for name, latent in program.latents.items()}


def one_by_one(program: PyroLoRA, draws: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Logits by running the program draw by draw, in evaluation mode."""
    program.model.eval()
    size = len(next(iter(draws.values())))
    with torch.no_grad():
        return torch.stack([program.logits({n: v[s] for n, v in draws.items()}, batch) for s in range(size)])


def whole_batch(program: PyroLoRA) -> dict[str, Tensor]:
    assert program.task is not None and program.task.test is not None
    return program.task.collate(list(program.task.test))


# -- vectorised or one by one ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorise", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 3, 8])
def test_every_draw_is_the_program_at_that_draw(vectorise: bool, chunk_size: int) -> None:
    """Law: row s is the function at draw s, whatever the chunks, with vmap or without."""
    program = tiny_program()
    draws, batch = draws_of(program, 7), whole_batch(program)
    expected = one_by_one(program, draws, batch)
    runner = Runner(program, draws, {}, chunk_size=chunk_size, vectorise=vectorise)
    assert torch.allclose(runner.evaluate(program.logits, batch), expected, atol=1e-5)
    assert runner.vectorise == vectorise
    assert (expected[0] - expected[1]).abs().max() > 1e-2


def test_chunks_bound_how_many_run_at_once() -> None:
    """Law: with chunk_size c no more than c draws run together."""
    program = tiny_program()
    sizes = []

    def function(draws: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        sizes.append(torch._C._functorch.get_unwrapped(draws["lora.query.A"]).shape[0])
        return program.logits(draws, batch)

    Runner(program, draws_of(program, 7), {}, chunk_size=3, vectorise=True).evaluate(function, whole_batch(program))
    assert sizes == [3, 3, 1]


def test_draws_one_after_another() -> None:
    """Law: `each` gives what `evaluate` stacks, and runs the model no sooner than a draw is asked for."""
    program = tiny_program()
    batch, ran = whole_batch(program), []

    def function(draws: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        ran.append(1)
        return program.logits(draws, batch)

    runner = Runner(program, draws_of(program, 3), {})
    with torch.no_grad():
        natural = list(runner.evaluate(program.logits, batch))
    for one in (runner, Runner(program, {}, {}), Runner(program, {}, {}, natural=lambda _: natural)):
        expected, count = one.evaluate(program.logits, batch), 0
        ran.clear()
        for s, value in enumerate(one.each(function, batch)):
            count += 1
            assert len(ran) == s + 1 and torch.allclose(value, expected[s], atol=1e-6) and not value.requires_grad
        assert count == len(expected)


def test_likelihoods_say_how_many_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: next tokens, whose logits have the vocabulary as an axis, run one draw at a time unless told otherwise, and
    need no vmap then; classes run eight."""
    for program, size in ((tiny_program(), 8), (language_posterior(MAP()).program, 1)):
        assert Runner(program, {}, {}).chunk_size == size and Runner(program, {}, {}, chunk_size=3).chunk_size == 3
    monkeypatch.setattr("pyrolora.inference.predict.shared_prefix", lambda *_: 1.0)
    assert not Runner(program, {}, {}).vectorise and Runner(program, {}, {}, chunk_size=3).vectorise


def test_without_draws_one_pass_serves() -> None:
    """Law: where nothing is random the function runs once, and the result has one row."""
    program = tiny_program()
    fixed = {name: value[0] for name, value in draws_of(program, 1).items()}
    calls = []

    def function(draws: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        calls.append(sorted(draws))
        return program.logits(draws, batch)

    batch = whole_batch(program)
    values = Runner(program, {}, fixed).evaluate(function, batch)
    assert calls == [sorted(program.latents)]
    assert torch.equal(values, one_by_one(program, {n: v[None] for n, v in fixed.items()}, batch))


@pytest.mark.parametrize("architecture", ["qwen3-moe", "mixtral-experts"], indirect=True)
def test_what_vmap_cannot_follow_runs_one_by_one(architecture: Architecture) -> None:
    """Law: mixtures of experts give each draw's own values, with or without vmap, and keep their weights."""
    program = PyroLoRA(
        architecture.base(),
        architecture.config(),
        priors={"*": Normal(0.3)},
        likelihood=Categorical(3),
        num_data=2,
    )
    held = {name: (id(p), p.clone()) for name, p in program.model.named_parameters()}
    draws, batch = draws_of(program, 3), {**architecture.inputs, "labels": torch.tensor([0, 2])}
    expected = one_by_one(program, draws, batch)
    runner = Runner(program, draws, {}, vectorise=True)
    for _ in range(2):
        assert torch.allclose(runner.evaluate(program.logits, batch), expected, atol=1e-5)
    assert all(held[n][0] == id(p) and torch.equal(held[n][1], p) for n, p in program.model.named_parameters())
    if program.placement._experts is not None:
        assert not runner.vectorise


@pytest.mark.parametrize("question", ["item", "branch"])
def test_data_dependent_python_runs_one_by_one(question: str) -> None:
    """Law: a function that looks at values falls back to a loop, at once and for good, with the same numbers."""
    program = tiny_program()
    draws, batch = draws_of(program, 3), whole_batch(program)
    attempts = []

    def function(draws: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        logits = program.logits(draws, batch)
        attempts.append(torch._C._functorch.is_batchedtensor(logits))
        if question == "item":
            return logits * (1.0 if logits.sum().item() > 0 else 2.0)
        return logits if logits.sum() > 0 else 2 * logits

    logits = one_by_one(program, draws, batch)
    expected = torch.stack([value if value.sum() > 0 else 2 * value for value in logits])
    runner = Runner(program, draws, {}, vectorise=True)
    for _ in range(2):
        assert torch.allclose(runner.evaluate(function, batch), expected, atol=1e-5)
    assert attempts == [True] + [False] * 6
    assert not runner.vectorise


def test_other_errors_are_the_users_to_see() -> None:
    """Law: an error that vmap has no part in is raised as it is, at the first attempt; the model is clean after it."""
    program = tiny_program()
    held = {name: id(p) for name, p in program.model.named_parameters()}
    calls = []

    def function(draws: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        calls.append(1)
        return program.logits(draws, batch) @ torch.zeros(5, 5)

    runner = Runner(program, draws_of(program, 3), {}, vectorise=True)
    with pytest.raises(RuntimeError, match=r"size mismatch|shapes cannot be multiplied|must match"):
        runner.evaluate(function, whole_batch(program))
    assert len(calls) == 1 and runner.vectorise
    assert {name: id(p) for name, p in program.model.named_parameters()} == held
    assert not program._running


# -- prefix sharing --------------------------------------------------------------------------------------------------


def last_layer_program() -> PyroLoRA:
    """Three layers, the last of another rank and so of another site."""
    config = lora(target_modules=["query"], rank_pattern={r"encoder\.layer\.2\.attention\.self\.query": 3})
    with isolated(0):
        return PyroLoRA(tiny_bert(layers=3), config, priors={"*": Normal(0.3)}, task=sentence_task())


class Watch:
    """Which linear maps ran on batched numbers, by name."""

    def __init__(self, program: PyroLoRA):
        self.batched: dict[str, bool] = {}
        for name, module in program.model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self.hook(name.removeprefix("base_model.model.")))

    def hook(self, name: str):  # type: ignore[no-untyped-def]
        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.batched[name] = torch._C._functorch.is_batchedtensor(output)

        return note


def test_what_precedes_the_first_random_layer_is_computed_once() -> None:
    """Law: with only the last layer random, every map before it, and its base map, runs once for all draws."""
    program = last_layer_program()
    assert program.sites["lora.query.1.A"].layers == ("bert.encoder.layer.2.attention.self.query",)
    watch = Watch(program)
    draws = draws_of(program, 4)
    random = {name: value for name, value in draws.items() if name.startswith("lora.query.1")}
    fixed = {name: value[0] for name, value in draws.items() if name not in random}
    batch = whole_batch(program)
    values = Runner(program, random, fixed, vectorise=True).evaluate(program.logits, batch)
    last = "bert.encoder.layer.2."
    before = {name for name in watch.batched if name < last}
    assert len([name for name in before if "lora_A" in name]) == 2
    assert not any(watch.batched[name] for name in before)
    assert not watch.batched[f"{last}attention.self.query.base_layer"]
    assert not watch.batched[f"{last}attention.self.value"]
    assert watch.batched[f"{last}attention.self.query.lora_A.default"]
    assert watch.batched[f"{last}attention.output.dense"]
    both = {**{name: value.expand(4, *value.shape) for name, value in fixed.items()}, **random}
    assert torch.allclose(values, one_by_one(program, both, batch), atol=1e-5)


def test_a_random_first_layer_shares_nothing_after_it() -> None:
    """Law: the measurement is not blind: with all sites random the adapters of every layer run on batched numbers."""
    program = last_layer_program()
    watch = Watch(program)
    Runner(program, draws_of(program, 2), {}, vectorise=True).evaluate(program.logits, whole_batch(program))
    assert all(batched for name, batched in watch.batched.items() if "lora_A" in name)
    assert not watch.batched["bert.encoder.layer.0.attention.self.key"]
    assert watch.batched["bert.encoder.layer.1.attention.self.key"]


def test_vectorises_by_itself_only_where_layers_are_shared() -> None:
    """Law: on a CPU draws run together where a fifth of the model precedes the first random layer, else one by one."""
    program = last_layer_program()
    draws = draws_of(program, 2)
    last = {name: value for name, value in draws.items() if name.startswith("lora.query.1")}
    head = {name: value for name, value in draws.items() if name.startswith("head")}
    assert 0 < shared_prefix(program, draws) < 0.2 < shared_prefix(program, last) < shared_prefix(program, head) < 1
    assert shared_prefix(program, []) == 1
    assert not Runner(program, draws, {}).vectorise
    assert Runner(program, last, {}).vectorise and Runner(program, head, {}).vectorise


# -- a data set ------------------------------------------------------------------------------------------------------


def test_long_texts_first_and_every_row_once() -> None:
    """Law: batches go from long texts to short, each row stands in one, and values have draws first."""
    program = tiny_program()
    data = sentence_task().test
    assert data is not None
    lengths = [len(ids) for ids in data["input_ids"]]
    parts = list(Runner(program, draws_of(program, 2), {}).run(program.logits, data, batch_size=5))
    order = [row for rows, _ in parts for row in rows]
    assert sorted(order) == list(range(12)) and [len(rows) for rows, _ in parts] == [5, 5, 2]
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True)
    assert lengths != sorted(lengths, reverse=True)
    for rows, values in parts:
        assert values.shape == (2, len(rows), 2)
        own = one_by_one(program, draws_of(program, 2), sentence_task().collate([data[row] for row in rows]))
        assert torch.allclose(values, own, atol=1e-5)


def test_multiple_choice_lengths_are_of_all_choices() -> None:
    """Law: rows with several choices go by the tokens of all of them; data without tokens stay as they are."""
    nested = datasets.Dataset.from_dict({"input_ids": [[[1], [1]], [[1, 2, 3], [1]], [[1, 2], [1]]]})
    assert _by_length(nested) == [1, 2, 0]
    assert _by_length(datasets.Dataset.from_dict({"x": [1.0, 2.0]})) == [0, 1]


@pytest.mark.parametrize("stop", ["end", "early", "error"])
def test_modes_are_restored(stop: str) -> None:
    """Law: prediction runs in evaluation mode, and every module's own mode comes back, however it ends."""
    program = tiny_program(dropout=0.3)
    program.model.train()
    program.model.base_model.model.bert.embeddings.eval()
    modes = {name: module.training for name, module in program.model.named_modules()}
    seen = []

    def function(draws: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        seen.append(any(module.training for module in program.model.modules()))
        if stop == "error":
            raise KeyError("stop")
        return program.logits(draws, batch)

    runs = Runner(program, draws_of(program, 2), {}).run(function, sentence_task().test, batch_size=5)
    if stop == "error":
        with pytest.raises(KeyError):
            next(runs)
    elif stop == "early":
        next(runs)
        runs.close()
    else:
        assert all(not values.requires_grad for _, values in runs)
    assert not any(seen)
    assert {name: module.training for name, module in program.model.named_modules()} == modes


def test_a_program_without_a_task_cannot_collate() -> None:
    """Law: the error says what is missing."""
    with pytest.raises(ValueError, match=r"PyroLoRA\(\.\.\., task=task\)"):
        next(Runner(linear_gaussian().program, {}, {}).run(lambda *_: torch.zeros(()), sentence_task().test))


# -- the functions ---------------------------------------------------------------------------------------------------


def test_log_probabilities_and_log_likelihood_by_hand() -> None:
    """Law: log-softmax of the logits, and its entry at the label."""
    program = tiny_program()
    batch = whole_batch(program)
    draw = {name: value[0] for name, value in draws_of(program, 1).items()}
    with torch.no_grad():
        expected = program.logits(draw, batch).log_softmax(-1)
        assert torch.allclose(log_probabilities(program)(draw, batch), expected, atol=1e-6)
        chosen = expected.gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1)
        assert torch.allclose(log_likelihood(program)(draw, batch), chosen, atol=1e-6)


def test_log_probabilities_stay_finite() -> None:
    """Law: a class that is e^-200 times less probable has log probability −200, not minus infinity."""
    program = PyroLoRA(
        LinearModel(torch.tensor([[200.0], [0.0]])),
        LoraConfig(r=1, target_modules=["linear"]),
        priors={"*": Normal(1.0)},
        likelihood=Categorical(2),
        num_data=1,
    )
    with torch.no_grad():
        values = log_probabilities(program)({}, {"x": torch.ones(1, 1)})
    assert values[0].tolist() == pytest.approx([0.0, -200.0])


def test_likelihood_parameters_vary_with_the_draw() -> None:
    """Law: the likelihood's own parameters are part of a draw and enter its density, under vmap too."""
    program = PyroLoRA(
        LinearModel(torch.randn(3, 4)),
        LoraConfig(r=2, target_modules=["linear"]),
        priors={"*": Normal(1.0)},
        likelihood=NormalLikelihood(),
        num_data=5,
    )
    draws = {"likelihood.scale": torch.tensor([0.5, 2.0])}
    fixed = program.placement.current()
    batch = {"x": torch.randn(5, 4), "labels": torch.randn(5, 3)}
    assert likelihood_parameters(program, {**fixed, **draws}) == draws
    values = Runner(program, draws, fixed).evaluate(log_likelihood(program), batch)
    mean = program.model.get_base_model().linear.base_layer(batch["x"])
    for row, scale in zip(values, (0.5, 2.0), strict=True):
        expected = torch.distributions.Normal(mean, scale).log_prob(batch["labels"]).sum(-1)
        assert torch.allclose(row, expected, atol=1e-5)
