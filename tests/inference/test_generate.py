from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pyrolora.diagnostics.language import mixture
from pyrolora.guides.input_adaptive import InputAdaptive
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.generate import generate
from pyrolora.inference.generation import Generation
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from tests.programs import chat_tokenizer, language_posterior, tiny_gpt2, tiny_llama, tiny_qwen3, tokenizer, untrained

PROMPTS = ["the cold stone", "in a warm house while dark water", "water"]
STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"

# A base, and the options of its adapter.
BASES: Mapping[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "llama": (tiny_llama, {}),
    "llama, lm_head": (tiny_llama, {"target_modules": ["q_proj", "lm_head"]}),
    "qwen3": (tiny_qwen3, {}),
    "gpt2": (tiny_gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
}
if STORIES.is_dir():
    BASES["stories260K"] = (lambda: AutoModelForCausalLM.from_pretrained(STORIES), {})  # type: ignore[index]


def words_of(name: str) -> PreTrainedTokenizerBase:
    if name != "stories260K":
        return tokenizer()
    found = AutoTokenizer.from_pretrained(STORIES)
    found.pad_token = found.eos_token
    return found


def posterior_over(name: str, dtype: torch.dtype = torch.float32) -> Posterior:
    base, adapter = BASES[name]
    return language_posterior(MeanField(random="*"), base().to(dtype), words_of(name), **adapter)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    """Mean field over a tiny Llama. Read only."""
    return language_posterior(MeanField(random="*"))


def encoded(prompt: str, words: PreTrainedTokenizerBase | None = None) -> list[int]:
    ids = (words or tokenizer())(prompt)["input_ids"]
    return ids if ids[-1] != tokenizer().sep_token_id else ids[:-1]  # without [SEP], which would end the text


def one(draws: dict[str, Tensor], s: int) -> dict[str, Tensor]:
    return {name: value[s] for name, value in draws.items()}


def same(a: Generation, b: Generation) -> bool:
    return [[t.tokens.tolist() for t in texts] for texts in a] == [[t.tokens.tolist() for t in texts] for texts in b]


def greedy(model: nn.Module, prompt: str, length: int, words: PreTrainedTokenizerBase | None = None) -> list[int]:
    """What transformers' own generate writes."""
    ids = torch.tensor([encoded(prompt, words)])
    options = {"max_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()  # type: ignore[operator]


def test_one_draw_is_transformers_own(posterior: Posterior) -> None:
    """Law: greedy text of one draw, and of each of several, is what transformers' generate writes under that draw."""
    draws, program = posterior.draw(3), posterior.program
    single = generate(posterior, PROMPTS, num_draws=1, max_new_tokens=7, temperature=0)
    each = generate(posterior, PROMPTS, num_draws=3, max_new_tokens=7, temperature=0, how="draws")
    program.model.eval()
    written = set()
    for i, prompt in enumerate(PROMPTS):
        for s in range(3):
            with program.placed(one(draws, s)):
                expected = greedy(program.model, prompt, 7)
            assert each.texts[i][s].tokens.tolist() == expected
            written.add(tuple(expected))
        assert single.texts[i][0].tokens.tolist() == each.texts[i][0].tokens.tolist()
        assert single.texts[i][0].mutual_information.max() < 1e-4
    assert len(written) > 3
    assert single.disagreement is None and each.disagreement is not None
    assert max(found.differing for found in each.disagreement) > 0


@pytest.mark.parametrize("weights", ["predictive", "uniform"])
def test_by_brute_force(posterior: Posterior, weights: str) -> None:
    """Law: log p, entropy and mutual information of each token are those of full forward passes of every prefix under
    every draw, without cache or padding, weighted by Bayes' rule on the tokens before."""
    found = generate(posterior, PROMPTS, num_draws=4, max_new_tokens=5, weights=weights)  # type: ignore[arg-type]
    draws, program = posterior.draw(4), posterior.program
    for prompt, (text,) in zip(PROMPTS, found, strict=True):
        likelihood = torch.ones(4, dtype=torch.double)
        for t, token in enumerate(text.tokens.tolist()):
            ids = torch.tensor([encoded(prompt) + text.tokens[:t].tolist()])
            rows = []
            for s in range(4):
                with torch.no_grad(), program.placed(one(draws, s)):
                    rows.append(program.model(input_ids=ids).logits[0, -1].double().softmax(-1))
            p, pi = torch.stack(rows), likelihood / likelihood.sum()
            mean = pi @ p
            information = pi @ (p * (p / mean).log()).sum(-1)  # Σ_s π_s KL(p_s ‖ p̄)
            assert text.log_prob[t].item() == pytest.approx(mean[token].log().item(), abs=1e-4)
            assert text.entropy[t].item() == pytest.approx(-(mean * mean.log()).sum().item(), abs=1e-4)
            assert text.mutual_information[t].item() == pytest.approx(information.item(), abs=1e-4)
            assert text.effective_draws[t].item() == pytest.approx(1 / pi.square().sum().item(), abs=1e-3)
            if weights == "predictive":
                likelihood *= p[:, token]
    assert max(texts[0].mutual_information.max() for texts in found) > 0.05


def test_the_text_has_the_probability_of_its_block(posterior: Posterior) -> None:
    """Law: Π_t p(w_t | w_<t) with predictive weights is 1/S Σ_s p(text | prompt, θ_s), as perplexity scores it; with
    uniform weights it is not."""
    found, flat = (generate(posterior, PROMPTS[0], num_draws=5, weights=w) for w in ("predictive", "uniform"))  # type: ignore[arg-type]
    ids, text = encoded(PROMPTS[0]), found.texts[0][0]
    whole = ids + text.tokens.tolist()
    labels = [-100] * len(ids) + text.tokens.tolist()
    data = Dataset.from_list([{"input_ids": whole, "attention_mask": [1] * len(whole), "labels": labels}])
    block = float(mixture(posterior.log_likelihood(data, 5).double())[0])
    assert text.log_prob.double().sum().item() == pytest.approx(block, abs=1e-3)
    assert text.effective_draws[0].item() == pytest.approx(5) and text.effective_draws[-1] < 4.5
    assert (flat.texts[0][0].effective_draws - 5).abs().max() < 1e-4


@pytest.mark.parametrize("how", ["mixture", "draws"])
def test_prompts_do_not_see_each_other(posterior: Posterior, how: str) -> None:
    """Law: prompts of other lengths, padded on the left, and in batches of any size, write what each writes alone."""
    options: dict = {"num_draws": 3, "max_new_tokens": 6, "how": how, "seed": 2}
    together = generate(posterior, PROMPTS, **options)
    assert same(together, generate(posterior, PROMPTS, batch_size=2, **options))
    for prompt, texts in zip(PROMPTS, together, strict=True):
        for text, alone in zip(texts, generate(posterior, prompt, **options).texts[0], strict=True):
            assert torch.equal(text.tokens, alone.tokens)
            torch.testing.assert_close(text.entropy, alone.entropy, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(text.log_prob, alone.log_prob, atol=1e-4, rtol=1e-4)


def test_absolute_positions() -> None:
    """Law: a model with absolute positions counts them from each prompt's first token, not from the padding."""
    posterior = posterior_over("gpt2")
    together = generate(posterior, PROMPTS, num_draws=2, max_new_tokens=5)
    for prompt, texts in zip(PROMPTS, together, strict=True):
        alone = generate(posterior, prompt, num_draws=2, max_new_tokens=5).texts[0][0]
        assert torch.equal(texts[0].tokens, alone.tokens)
        torch.testing.assert_close(texts[0].entropy, alone.entropy, atol=1e-4, rtol=1e-4)


def passes(posterior: Posterior, **options: Any) -> tuple[Generation, int]:
    """What is generated, and how many times the base model ran."""
    ran: list[int] = []
    hook = posterior.program.model.get_base_model().register_forward_hook(lambda *_: ran.append(1))
    try:
        return generate(posterior, PROMPTS, **options), len(ran)
    finally:
        hook.remove()


def assert_equal(found: Generation, expected: Generation) -> None:
    assert same(found, expected)
    for texts, others in zip(found, expected, strict=True):
        for text, other in zip(texts, others, strict=True):
            for name in ("log_prob", "entropy", "mutual_information", "effective_draws"):
                torch.testing.assert_close(getattr(text, name), getattr(other, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["mixture", "draws"])
@pytest.mark.parametrize("name", BASES)
def test_draws_share_a_pass(name: str, how: str) -> None:
    """Law: draws in chunks of any size write the tokens, and have the log probabilities, entropies and mutual
    informations, of draws run one after another; a chunk costs one pass a token."""
    posterior = posterior_over(name, torch.float64)  # far from their means, real weights amplify rounding
    options: dict[str, Any] = {"num_draws": 5, "max_new_tokens": 6, "how": how, "seed": 1}
    loop, count = passes(posterior, chunk_size=1, **options)
    longest = max(len(text.tokens) for texts in loop for text in texts)
    assert count == 5 * longest or how == "draws"
    for chunk_size, chunks in ((8, 1), (3, 2)):
        found, count = passes(posterior, chunk_size=chunk_size, **options)
        assert_equal(found, loop)
        assert count == chunks * longest or (how == "draws" and count <= chunks * longest)
    informations = torch.cat([text.mutual_information for texts in loop for text in texts])
    assert len({tuple(text.tokens.tolist()) for texts in loop for text in texts}) > 2
    assert (informations.max() > 0.01) == (how == "mixture")


class Routed(nn.Module):
    """Two experts as linear maps; each token sees one of them."""

    def __init__(self, width: int):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        output = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            mine = (flat[:, 0] > 0) == bool(i)
            output[mine] = expert(flat[mine])
        return output.view_as(x)


def routed() -> LlamaForCausalLM:
    model = tiny_llama()
    with isolated(0):
        model.model.layers[1].mlp = Routed(16)
    return model


@pytest.mark.parametrize("how", ["mixture", "draws"])
@pytest.mark.parametrize(
    ("base", "targets", "reason"),
    [
        (tiny_llama, ["embed_tokens", "v_proj"], "embed_tokens"),
        (routed, ["q_proj", "experts.0", "experts.1"], "experts."),
    ],
)
def test_draws_that_share_no_pass(
    base: Callable, targets: list[str], reason: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Law: adapted embeddings, and adapted maps that see some tokens only, are run draw by draw, once that is known;
    it is said once, and the numbers are those of the loop."""
    posterior = language_posterior(MeanField(random="*"), base(), target_modules=targets)
    options: dict[str, Any] = {"num_draws": 3, "max_new_tokens": 5, "how": how, "batch_size": 1}
    loop = generate(posterior, PROMPTS, chunk_size=1, **options)
    with caplog.at_level(logging.INFO, logger="pyrolora"):
        found = generate(posterior, PROMPTS, **options)
    assert_equal(found, loop)
    assert [reason in record.message and "one by one" in record.message for record in caplog.records] == [True]


def test_seeds(posterior: Posterior) -> None:
    """Law: the same seed writes the same text and leaves the caller's random state and the model's mode alone; another
    seed writes another text."""
    posterior.program.model.train()
    state = torch.get_rng_state()
    first = generate(posterior, PROMPTS[0], max_new_tokens=6, num_draws=3)
    assert torch.equal(torch.get_rng_state(), state) and posterior.program.model.training
    torch.rand(3)
    assert same(first, generate(posterior, PROMPTS[0], max_new_tokens=6, num_draws=3))
    assert not same(first, generate(posterior, PROMPTS[0], max_new_tokens=6, num_draws=3, seed=1))


def test_sampling_follows_the_mixture(posterior: Posterior) -> None:
    """Law: over seeds, tokens are drawn from p^(1/τ): the mean of log p is −H at τ = 1, and higher where τ is lower."""
    frozen = Posterior(posterior.program, posterior.guide)
    frozen.draw = lambda num_draws, *, seed=0: posterior.draw(num_draws, seed=0)  # type: ignore[method-assign]
    texts = [generate(frozen, "water", num_draws=2, max_new_tokens=1, seed=s).texts[0][0] for s in range(150)]
    nats = torch.cat([text.log_prob for text in texts])
    error = nats.std() / len(nats) ** 0.5
    assert abs(nats.mean() + texts[0].entropy[0]) < 3.5 * error
    cold = [generate(frozen, "water", num_draws=2, max_new_tokens=1, seed=s, temperature=0.5) for s in range(40)]
    assert torch.cat([found.texts[0][0].log_prob for found in cold]).mean() > nats.mean() + 3.5 * error


def test_the_end(posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a text ends with the model's end-of-text token, which counts as its last, while others go on."""
    free = generate(posterior, PROMPTS, num_draws=2, max_new_tokens=6, temperature=0)
    tokens = [texts[0].tokens.tolist() for texts in free]
    stop = tokens[0][2]
    monkeypatch.setattr(posterior.program.model.get_base_model().generation_config, "eos_token_id", [stop, 7])
    ended = generate(posterior, PROMPTS, num_draws=2, max_new_tokens=6, temperature=0)
    for own, (text,) in zip(tokens, ended, strict=True):
        expected = own[: own.index(stop) + 1] if stop in own else own
        assert text.tokens.tolist() == expected and len(text.entropy) == len(text.pieces) == len(expected)
    assert len({len(texts[0].tokens) for texts in ended}) > 1


def test_pieces_are_the_text(posterior: Posterior) -> None:
    """Law: the pieces join to the text, which continues the prompt as the tokenizer decodes the whole."""
    for prompt, (text,) in zip(PROMPTS, generate(posterior, PROMPTS, num_draws=2, max_new_tokens=9), strict=True):
        assert "".join(text.pieces) == text.text
        ids = encoded(prompt) + text.tokens.tolist()
        assert prompt + text.text == tokenizer().decode(ids, skip_special_tokens=True)
        for piece, token in zip(text.pieces, text.tokens.tolist(), strict=True):
            assert piece.strip() == tokenizer().decode([token]).removeprefix("##").strip()


@pytest.mark.parametrize("name", BASES)
def test_stock_peft_writes_the_same(name: str, tmp_path: Path) -> None:
    """Law: the mean and each draw, exported and loaded by stock PEFT side by side, write the same greedy text."""
    posterior, words = posterior_over(name), words_of(name)
    posterior.export_peft(tmp_path / "mean")
    for s in range(2):
        posterior.export_peft(tmp_path / f"draw-{s}", draw=s)
    model = PeftModel.from_pretrained(BASES[name][0](), str(tmp_path / "mean"), adapter_name="mean").eval()
    for s in range(2):
        model.load_adapter(str(tmp_path / f"draw-{s}"), adapter_name=f"draw-{s}")
    mean = generate(posterior, PROMPTS, num_draws=0, max_new_tokens=8, temperature=0)
    draws = generate(posterior, PROMPTS, num_draws=2, max_new_tokens=8, temperature=0, how="draws")
    written = set()
    for i, prompt in enumerate(PROMPTS):
        for adapter, text in zip(("mean", "draw-0", "draw-1"), (mean.texts[i][0], *draws.texts[i]), strict=True):
            model.set_adapter(adapter)
            assert greedy(model, prompt, 8, words) == text.tokens.tolist()
            written.add(tuple(text.tokens.tolist()))
    assert len(written) > 3


@pytest.fixture(scope="module")
def chatting() -> Posterior:
    """Over a tiny Llama that knows ChatML. Read only."""
    words = chat_tokenizer()
    return language_posterior(MeanField(random="*"), tiny_llama(words), words)


def test_chat(chatting: Posterior) -> None:
    """Law: with chat, the text is what transformers' generate answers to the user's turn in the tokenizer's template,
    and ends where the turn does; the prompt stays the user's, and a template's options reach it."""
    words, program = chat_tokenizer(), chatting.program
    draw = one(chatting.draw(1), 0)
    written = []
    for options in ({}, {"system": "be warm"}):
        found = generate(chatting, PROMPTS, num_draws=1, max_new_tokens=7, temperature=0, chat=options or True)
        for prompt, (text,) in zip(PROMPTS, found, strict=True):
            turns = [{"role": "user", "content": prompt}]
            given = words.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", **options)
            own: Any = given["input_ids"]
            rendered = words.decode(own[0])
            assert rendered.count("<|im_start|>") == 2 + len(options) and rendered.endswith("<|im_start|> assistant")
            with program.placed(draw):
                whole = program.model.generate(input_ids=own, attention_mask=torch.ones_like(own), max_new_tokens=7)
            written.append(text.tokens.tolist())
            assert written[-1] == whole[0, own.shape[1] :].tolist()
            assert text.prompt == prompt and "".join(text.pieces) == text.text and "assistant" not in text.text
    assert written[: len(PROMPTS)] != written[len(PROMPTS) :]
    plain = generate(chatting, PROMPTS, num_draws=1, max_new_tokens=7, temperature=0)
    assert [texts[0].tokens.tolist() for texts in plain] != written[: len(PROMPTS)]


def test_chat_ends_with_its_turn(chatting: Posterior) -> None:
    """Law: the token that ends a turn, the tokenizer's end of text, ends the reply and is no part of its words."""
    end, head = chat_tokenizer().eos_token_id, chatting.program.model.get_base_model().lm_head
    hook = head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, torch.tensor(end), 1e4))
    text = generate(chatting, "water", num_draws=2, chat=True).texts[0][0]
    hook.remove()
    assert text.tokens.tolist() == [end] and text.text == ""


def test_chat_that_cannot_be(posterior: Posterior, chatting: Posterior) -> None:
    """Law: a tokenizer without a chat template, an empty turn, and one that is too long are refused."""
    with pytest.raises(ValueError, match=r"has no chat template.*Leave chat out, or set tokenizer\.chat_template"):
        generate(posterior, "water", chat=True)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate(chatting, " ", chat=True)
    with pytest.raises(ValueError, match="prompt 0 has 6 tokens; with 2044 new ones"):
        generate(chatting, "water", max_new_tokens=2044, chat=True)


def test_a_point_estimate_has_no_doubt() -> None:
    """Law: a point estimate runs once, and its mutual information is 0."""
    found = generate(language_posterior(MAP()), "water", num_draws=8, max_new_tokens=4)
    assert found.num_draws == 1 and found.texts[0][0].mutual_information.max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "both"}, "how is one of mixture, draws, not 'both'"),
        ({"weights": "equal"}, "weights is one of predictive, uniform, not 'equal'"),
        ({"temperature": -1.0}, "temperature is a number ≥ 0, not -1.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is at least 1, not 0"),
        ({"chunk_size": 0}, "chunk_size is at least 1, not 0"),
        ({"num_draws": -1}, "num_draws is at least 0, not -1"),
        ({"prompts": []}, "no prompt to continue"),
        ({"prompts": ["water", " "]}, "prompt 1 is empty"),
        ({"max_new_tokens": 4000}, "prompt 0 has 2 tokens; with 4000 new ones that is more than the model's 2048 "),
    ],
)
def test_wrong_values(posterior: Posterior, options: dict, message: str) -> None:
    """Law: what cannot be generated is refused with what is right, before any pass of the model."""
    with pytest.raises(ValueError, match=message):
        generate(posterior, **{"prompts": "water", **options})


def test_what_generates_no_text() -> None:
    """Law: a classifier, a posterior without a task, and a guide whose predictions are no draws of weights say so."""
    with pytest.raises(ValueError, match="BertForSequenceClassification generates no text"):
        generate(untrained(MAP()), "water")
    bare = language_posterior(MAP())
    bare.program.task = None
    with pytest.raises(ValueError, match="generation needs the program's task"):
        generate(bare, "water")
    with pytest.raises(ValueError, match="InputAdaptive predicts by other means than draws of the weights"):
        generate(language_posterior(InputAdaptive()), "water")
