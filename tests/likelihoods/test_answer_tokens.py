from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pyrolora.likelihoods.answer_tokens import AnswerTokens

TEXTS = [[5, 9, 3, 7, 11, 2], [8, 4, 6], [10]]
TOKENS = [12, 3, 7]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_key_value_heads=1, **sizes)).eval()


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


def padded(side: str) -> dict[str, torch.Tensor]:
    longest = max(map(len, TEXTS))
    ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    for n, text in enumerate(TEXTS):
        where = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
        ids[n, where], mask[n, where] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    likelihood = AnswerTokens(TOKENS)
    return likelihood.logits(model(**likelihood.forward_inputs(batch)), batch)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_after_the_last_real_token(llama, side):
    """Law: a padded row's logits are the K answer tokens' logits after that text alone, whatever the side."""
    out = logits(llama, padded(side))
    for n, text in enumerate(TEXTS):
        with torch.no_grad():
            alone = llama(input_ids=torch.tensor([text])).logits[0, -1]
        torch.testing.assert_close(out[n], alone[TOKENS], atol=1e-5, rtol=0)


def test_absolute_positions_agree_with_position_ids(gpt2):
    """Law: with position_ids a left-padded batch of an absolute-position model equals the right-padded one."""
    left = padded("left")
    wrong = logits(gpt2, left)
    left["position_ids"] = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    right = logits(gpt2, padded("right"))
    torch.testing.assert_close(logits(gpt2, left), right, atol=1e-5, rtol=0)
    assert (wrong - right).abs().max() > 1e-3


def test_without_a_mask_every_position_is_real(llama):
    """Law: no attention mask means the last position is the last real one."""
    ids = torch.tensor([TEXTS[0]])
    torch.testing.assert_close(
        logits(llama, {"input_ids": ids})[0], logits(llama, padded("right"))[0], atol=1e-5, rtol=0
    )


def test_softmax_is_over_the_answers_alone(llama):
    """Law: log p(y) = f_y − log Σ_k exp f_k over the K answers, by a loop; other tokens carry no probability."""
    batch = {**padded("right"), "labels": torch.tensor([2, 0, 1])}
    f, likelihood = logits(llama, batch), AnswerTokens(TOKENS)
    out = likelihood.log_prob(f, {}, batch)
    for n, label in enumerate(batch["labels"].tolist()):
        row = f[n].tolist()
        assert out[n].item() == pytest.approx(row[label] - math.log(sum(map(math.exp, row))), abs=1e-5)
    torch.testing.assert_close(likelihood.probabilities(f, {}, batch).sum(-1), torch.ones(3))


def test_vmap_over_draws_is_the_loop():
    """Law: selecting and scoring answers under vmap equals doing so draw by draw."""
    batch = {**padded("left"), "labels": torch.tensor([2, 0, 1])}
    draws = torch.randn(4, 3, 6, 20, generator=torch.Generator().manual_seed(0))
    likelihood = AnswerTokens(TOKENS)

    def score(scores: torch.Tensor) -> torch.Tensor:
        return likelihood.log_prob(likelihood.logits(SimpleNamespace(logits=scores), batch), {}, batch)

    torch.testing.assert_close(torch.vmap(score)(draws), torch.stack([score(draw) for draw in draws]))


@pytest.mark.parametrize(("tokens", "message"), [([3], "at least 2"), ([3, 5, 3], "share a token")])
def test_answers_must_be_distinct(tokens, message):
    """Law: one answer, or two answers with one token, is an error."""
    with pytest.raises(ValueError, match=message):
        AnswerTokens(tokens)
