from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pyrolora.likelihoods.next_token import NextToken

TEXTS = [[5, 9, 3, 7, 11, 2], [8, 4, 6, 1], [10, 3]]
LIKELIHOOD = NextToken()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_key_value_heads=1, **sizes)).eval()


def padded(side: str, texts: list[list[int]] = TEXTS) -> dict[str, torch.Tensor]:
    longest = max(map(len, texts))
    batch = {name: torch.zeros(len(texts), longest, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(texts), longest), -100)
    for n, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
        batch["input_ids"][n, where] = batch["labels"][n, where] = torch.tensor(text)
        batch["attention_mask"][n, where] = 1
    return batch


@torch.no_grad()
def log_prob(model, batch) -> torch.Tensor:
    return LIKELIHOOD.log_prob(LIKELIHOOD.logits(model(**LIKELIHOOD.forward_inputs(batch)), batch), {}, batch)


def test_sum_equals_the_models_own_loss(model):
    """Law: −Σ_n log p(text_n) is Hugging Face's mean loss times the number of scored tokens."""
    batch = padded("right")
    with torch.no_grad():
        loss = model(**batch).loss
    count = LIKELIHOOD.tokens(batch)
    assert count.tolist() == [5, 3, 1]
    torch.testing.assert_close(-log_prob(model, batch).sum(), loss * count.sum())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_scores_the_same_alone_and_padded(model, side):
    """Law: padding, on either side, changes no text's log probability: it equals a loop over its tokens."""
    out = log_prob(model, padded(side))
    for n, text in enumerate(TEXTS):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([text])).logits[0].log_softmax(-1)
        by_hand = sum(scores[t, token].item() for t, token in enumerate(text[1:]))
        assert out[n].item() == pytest.approx(by_hand, abs=1e-4)


def test_context_labels_are_not_scored(model):
    """Law: a label of −100 inside a text takes exactly that token's term out of the sum."""
    batch = padded("right", TEXTS[:1])
    full = log_prob(model, batch)
    with torch.no_grad():
        scores = model(input_ids=batch["input_ids"]).logits[0].log_softmax(-1)
    batch["labels"][0, 2] = -100
    torch.testing.assert_close(log_prob(model, batch), full - scores[1, TEXTS[0][2]])


def test_distribution_has_batch_shape_b_and_the_same_density(model):
    """Law: the distribution's batch shape is (b,) and its density at the observation is log_prob."""
    for side in ("left", "right"):
        batch = padded(side)
        with torch.no_grad():
            logits = LIKELIHOOD.logits(model(**LIKELIHOOD.forward_inputs(batch)), batch)
        distribution = LIKELIHOOD.distribution(logits, {}, batch)
        assert distribution.batch_shape == (3,) and distribution.event_shape == (5,)
        observed = LIKELIHOOD.observation(batch)
        torch.testing.assert_close(distribution.log_prob(observed), LIKELIHOOD.log_prob(logits, {}, batch))


def test_unlabelled_texts_score_what_the_mask_shows(model):
    """Law: without labels, what counts is each real token that follows a real token."""
    for side in ("left", "right"):
        batch = padded(side)
        labelled = LIKELIHOOD.scored(batch)
        del batch["labels"]
        assert LIKELIHOOD.scored(batch).tolist() == labelled.tolist()
        assert LIKELIHOOD.observation(batch) is None


def test_vmap_over_draws_is_the_loop():
    """Law: log_prob and the distribution under vmap equal the loop over draws."""
    batch = padded("left")
    draws = torch.randn(4, 3, 6, 20, generator=torch.Generator().manual_seed(0))

    def score(scores: torch.Tensor) -> torch.Tensor:
        return LIKELIHOOD.log_prob(LIKELIHOOD.logits(SimpleNamespace(logits=scores), batch), {}, batch)

    def density(scores: torch.Tensor) -> torch.Tensor:
        return LIKELIHOOD.distribution(scores[:, :-1], {}, batch).log_prob(LIKELIHOOD.observation(batch))

    expected = torch.stack([score(draw) for draw in draws])
    torch.testing.assert_close(torch.vmap(score)(draws), expected)
    torch.testing.assert_close(torch.vmap(density)(draws), expected)


def test_there_are_no_class_probabilities():
    """Law: probabilities is an error that names what to use instead."""
    with pytest.raises(NotImplementedError, match=r"log_prob.*AnswerTokens"):
        LIKELIHOOD.probabilities(torch.zeros(1, 1, 2), {}, {})
