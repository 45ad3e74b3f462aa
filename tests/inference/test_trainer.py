"""The trainer: what it logs, its optimiser, and evaluation during training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from pyrolora.guides.base import Guide
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.elbo import Objective, TemperedELBO, Terms
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.trainer import ELBOTrainer, summary
from tests.programs import sentence_task, tiny_program


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    chosen: dict = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "disable_tqdm": True}
    chosen |= {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "use_cpu": True, **changes}
    return TrainingArguments(output_dir=str(folder), **chosen)


def trainer(folder: Path, guide: Guide, **changes: object) -> ELBOTrainer:
    program = tiny_program()
    guide.bind(program)
    args = arguments(folder, remove_unused_columns=False, **changes)
    assert program.task is not None
    return ELBOTrainer(
        Objective(program, guide), args=args, train_dataset=program.task.train, data_collator=program.task.collate
    )


# -- logs ------------------------------------------------------------------------------------------------------------


def test_summary_by_hand(tmp_path: Path) -> None:
    """Law: means over steps, per example; points enter as a log prior, random sites as a KL, β the objective alone."""
    program = tiny_program()
    guide = MeanField(random="lora.query.A")
    guide.bind(program)
    objective = Objective(program, guide, 0.5)
    divergences = [
        {"lora.query.A": 12.0, "head.classifier.bias": 24.0},
        {"lora.query.A": 36.0, "head.classifier.bias": -24.0},
    ]
    points = frozenset({"head.classifier.bias"})
    steps = [
        Terms(torch.tensor(data), {name: torch.tensor(value) for name, value in kl.items()}, points=points)
        for data, kl in zip((-48.0, -24.0), divergences, strict=True)
    ]
    assert summary(steps, objective) == {
        "data": -36 / 24,
        "kl": 1.0,
        "kl/lora.query.A": 1.0,
        "log_prior": 0.0,
        "log_prior/head.classifier.bias": 0.0,
        "elbo": -2.5,
        "objective": -2.0,
    }


def test_a_log_row_is_the_mean_since_the_last(tmp_path: Path) -> None:
    """Law: logging every second step gives the means of two steps of the run that logs each."""
    each, second = (
        [row for row in fit(tiny_program(), MeanField(random="*"), args=arguments(tmp_path, logging_steps=n)).history]
        for n in (1, 2)
    )
    each, second = ([row for row in rows if "elbo" in row] for rows in (each, second))
    assert [row["step"] for row in each] == [1, 2, 3, 4] and [row["step"] for row in second] == [2, 4]
    for i, row in enumerate(second):
        for name in ("elbo", "data", "kl", "kl/lora.query.A", "loss"):
            assert row[name] == pytest.approx((each[2 * i][name] + each[2 * i + 1][name]) / 2, rel=1e-3), name


def test_progress_shows_the_objective(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Law: with a progress bar on, the terms stand beside it and no line is printed for each log."""
    run = trainer(tmp_path, MeanField(random="*"), disable_tqdm=False)
    run.train()
    shown = capsys.readouterr()
    assert "elbo=" in shown.err and "kl=" in shown.err and "4/4" in shown.err
    assert "{'" not in shown.out
    silent = trainer(tmp_path, MeanField(random="*"))
    silent.train()
    assert "elbo=" not in capsys.readouterr().err


def test_sharding_by_the_trainer_is_refused(tmp_path: Path) -> None:
    """Law: what would shard the adapters stops before training, and the message names what shards the base instead."""
    for options in ({"fsdp": "full_shard"}, {"fsdp": True}):
        with pytest.raises(ValueError, match=r"pyrolora.shard\(program\) before fit"):
            trainer(tmp_path, MAP(), **options)


@pytest.mark.parametrize("flag", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharding_by_the_launcher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    """Law: what `accelerate launch --use_fsdp` or `--use_deepspeed` leaves in the environment is refused likewise, and
    the same flag set to false is not."""
    program, args = tiny_program(), arguments(tmp_path, remove_unused_columns=False)
    guide = MAP()
    guide.bind(program)
    monkeypatch.setenv(flag, "true")
    with pytest.raises(ValueError, match=r"pyrolora.shard\(program\) before fit"):
        ELBOTrainer(Objective(program, guide), args=args)
    monkeypatch.setenv(flag, "false")
    ELBOTrainer(Objective(program, guide), args=args)


# -- optimiser -------------------------------------------------------------------------------------------------------


def test_the_optimiser_has_the_guides_groups(tmp_path: Path) -> None:
    """Law: the training arguments choose the optimiser; the guide says what learns at which rate, without decay."""
    guide = MeanField(random="*.A", scale_learning_rate=7.0)
    optimiser = trainer(tmp_path, guide, optim="adamw_torch", adam_beta1=0.8).create_optimizer()
    assert type(optimiser) is torch.optim.AdamW
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    assert set(rates) == {id(p) for p in guide.parameters()}
    assert {rates[id(p)] for p in guide.log_scale.values()} == {7 * 1e-2}
    assert {rates[id(p)] for p in guide.points.values()} == {1e-2}
    assert all(group["weight_decay"] == 0 and group["betas"] == (0.8, 0.999) for group in optimiser.param_groups)
    assert type(trainer(tmp_path, MAP(), optim="sgd").create_optimizer()) is torch.optim.SGD


class TwoRates(MAP):
    """Learns the head at ten times the rate."""

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        named = dict(self.points.items())
        head = [p for name, p in named.items() if name.startswith("head")]
        rest = [p for name, p in named.items() if not name.startswith("head")]
        return [{"params": rest, "lr": learning_rate}, {"params": head, "lr": 10 * learning_rate}]


def test_a_step_moves_each_group_at_its_rate(tmp_path: Path) -> None:
    """Law: one step of gradient descent on the whole data moves θ by its group's rate times the gradient of −L/N."""
    options = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0, "per_device_train_batch_size": 24}
    run = trainer(tmp_path, TwoRates(), learning_rate=1e-3, **options)
    guide = run.objective.guide
    run.objective(sentence_task().collate(list(sentence_task().train))).backward()
    expected = {name: p.detach() - 1e-3 * p.grad for name, p in guide.points.items() if not name.startswith("head")}
    expected |= {name: p.detach() - 1e-2 * p.grad for name, p in guide.points.items() if name.startswith("head")}
    guide.zero_grad()
    run.train()
    for name, parameter in guide.points.items():
        assert torch.allclose(parameter, expected[name], atol=1e-6), name


# -- evaluation ------------------------------------------------------------------------------------------------------


def test_validation_loss_by_hand(tmp_path: Path) -> None:
    """Law: eval_loss is −(mean log-likelihood of the split) + (Σ −log p(θ))/N, also when the last batch is smaller."""
    program = tiny_program()
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=7)
    posterior = fit(program, MAP(), args=args)
    rows = [row for row in posterior.history if "eval_loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    split = sentence_task().validation
    assert split is not None
    data = posterior.log_likelihood(split, 1).mean()
    objective = TemperedELBO()
    with torch.no_grad():
        objective.differentiable_loss(program, posterior.guide, sentence_task().collate(list(split)))
    assert objective.terms is not None
    cost = sum(value.item() for value in objective.terms.kl.values())
    assert rows[-1]["eval_loss"] == pytest.approx(-data.item() + cost / 24, rel=1e-4)


def test_validation_changes_nothing_of_the_fit(tmp_path: Path) -> None:
    """Law: with and without evaluation the fit is the same to the bit, and so are the rows that it logs."""
    guide = MeanField(random="*", noise="example")
    plain = fit(tiny_program(dropout=0.1), guide, args=arguments(tmp_path))
    watched = fit(tiny_program(dropout=0.1), guide, args=arguments(tmp_path, eval_strategy="steps", eval_steps=1))
    assert all(torch.equal(plain.mean()[name], value) for name, value in watched.mean().items())
    first, second = ([r["elbo"] for r in p.history if "elbo" in r] for p in (plain, watched))
    assert first == second


def test_validation_uses_the_same_draws_each_time(tmp_path: Path) -> None:
    """Law: two evaluations of one state have the same loss: common random numbers, in evaluation mode."""
    run = trainer(tmp_path, MeanField(random="*", noise="example"))
    split = sentence_task().validation
    first = run.evaluate(split)["eval_loss"]
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert run.evaluate(split)["eval_loss"] == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not run._terms


def test_the_best_checkpoint_can_be_kept(tmp_path: Path) -> None:
    """Law: load_best_model_at_end leaves the state of the chosen step (here the highest loss, which is the first)."""
    args = arguments(
        tmp_path,
        max_steps=6,
        learning_rate=0.5,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    posterior = fit(tiny_program(), MAP(), args=args)
    losses = {row["step"]: row["eval_loss"] for row in posterior.history if "eval_loss" in row}
    best = max(losses, key=lambda step: losses[step])
    assert best < 6
    again = fit(tiny_program(), MAP(), args=arguments(tmp_path / "again", max_steps=6, learning_rate=0.5))
    assert any(not torch.equal(again.mean()[name], value) for name, value in posterior.mean().items())
    split = sentence_task().validation
    assert split is not None
    data = Posterior(posterior.program, posterior.guide).log_likelihood(split, 1).mean()
    objective = TemperedELBO()
    with torch.no_grad():
        objective.differentiable_loss(posterior.program, posterior.guide, sentence_task().collate(list(split)))
    assert objective.terms is not None
    cost = sum(value.item() for value in objective.terms.kl.values())
    assert -data.item() + cost / 24 == pytest.approx(losses[best], rel=1e-4)
