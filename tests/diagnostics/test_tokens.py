from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pyrolora.diagnostics.language import evaluate_language
from pyrolora.diagnostics.tokens import _pieces, token_uncertainty
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.generate import Weights
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.predict import Runner
from pyrolora.inference.randomness import isolated
from pyrolora.tasks.language_modeling import LanguageModeling
from tests.programs import language_posterior, tiny_program, tokenizer

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
TEXTS = Dataset.from_dict({"text": ["the dark house", "in a cold river the stone lies", "water runs while warm"]})
NUMBERS = ["log_prob", "expected_log_prob", "entropy", "expected_entropy", "mutual_information", "effective_draws"]


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    """Mean field over a tiny Llama, away from its start. Read only."""
    return language_posterior(MeanField(random="*"))


def by_hand(posterior: Posterior, data: Dataset, size: int, *, predictive: bool) -> pd.DataFrame:
    """The table from one pass for each draw over each row alone, softmax over the vocabulary, all draws kept."""
    posterior.program.model.eval()  # GPT-2 has dropout
    draws, lines = posterior.draw(size), []
    for row, ids in enumerate(data["input_ids"]):
        found = []
        for s in range(size):
            with torch.no_grad(), posterior.program.placed({name: value[s] for name, value in draws.items()}):
                found.append(posterior.program.model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1))
        p = torch.stack(found)
        weights = torch.full((size,), 1 / size, dtype=torch.double)
        for position in range(1, len(ids)):
            each = p[:, position - 1]
            mean, own = weights @ each, each[:, ids[position]]
            entropy, expected = -(mean * mean.log()).sum(), -(weights * (each * each.log()).sum(-1)).sum()
            numbers = [(weights @ own).log(), weights @ own.log(), entropy, expected, entropy - expected]
            lines.append([row, position, ids[position], *map(float, numbers), float(1 / (weights**2).sum())])
            if predictive:
                weights = weights * own / (weights * own).sum()
    return pd.DataFrame(lines, columns=["row", "position", "token", *NUMBERS])


@pytest.mark.parametrize("weights", ["uniform", "predictive"])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_tokens_by_hand(posterior: Posterior, base: str, weights: Weights) -> None:
    """Law: log p, H[Σ π p], Σ π H[p], their difference, Σ π log p and 1/Σ π² of every token, from a softmax over the
    vocabulary in a loop over draws and rows, with π = 1/S or ∝ the probability of the tokens before."""
    if base == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "initializer_range": 0.5}
        with isolated(0):
            model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer()), **sizes))
        posterior = language_posterior(MeanField(random="*"), model, target_modules=["c_attn"], fan_in_fan_out=True)
    task = posterior.program.task
    assert task is not None
    data = task.train.select(range(len(task.train) - 1, -1, -1))
    assert len(data[0]["input_ids"]) < len(data[1]["input_ids"])  # long rows run first, and come back in order
    found = token_uncertainty(posterior, data, num_draws=5, weights=weights, batch_size=2)
    expected = by_hand(posterior, data, 5, predictive=weights == "predictive")
    pd.testing.assert_frame_equal(found.drop(columns="piece"), expected, rtol=1e-4, atol=2e-5)
    assert found["mutual_information"].max() > 0.05
    assert (found["log_prob"] >= found["expected_log_prob"] - 1e-6).all()


@pytest.mark.parametrize("weights", ["uniform", "predictive"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(posterior: Posterior, side: str, weights: Weights) -> None:
    """Law: a row's numbers and positions are those it has alone, whatever it is padded with and on which side."""
    task = posterior.program.task
    assert isinstance(task, LanguageModeling)
    data = task.train
    assert len({len(ids) for ids in data["input_ids"]}) > 1
    was, task.tokenizer.padding_side = task.tokenizer.padding_side, side
    try:
        together = token_uncertainty(posterior, data, num_draws=3, weights=weights, batch_size=8)
        rows = [data.select([n]) for n in range(len(data))]
        alone = [token_uncertainty(posterior, row, num_draws=3, weights=weights) for row in rows]
    finally:
        task.tokenizer.padding_side = was
    for row, table in enumerate(alone):
        own = together[together["row"] == row].assign(row=0).reset_index(drop=True)
        pd.testing.assert_frame_equal(own, table, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [None, 3])
def test_predictive_weights_sum_to_the_perplexity(posterior: Posterior, stride: int | None) -> None:
    """Law: with weights="predictive" the log probabilities sum to log 1/S Σ_s p(block | θ_s) of `evaluate_language`,
    in blocks that begin with context too; with uniform weights they do not."""
    data = LanguageModeling(tokenizer(), train=TEXTS, max_length=6, stride=stride).train
    score = evaluate_language(posterior, data, num_draws=6)
    sums = {}
    for weights in get_args(Weights):
        sums[weights] = token_uncertainty(posterior, data, num_draws=6, weights=weights)["log_prob"].sum()
    total = -score.nats_per_token.value * score.num_tokens
    assert sums["predictive"] == pytest.approx(total, rel=1e-6)
    assert abs(sums["uniform"] - total) > 1e-2


def test_context_is_not_scored(posterior: Posterior) -> None:
    """Law: overlapping blocks give every token of the stream but the first once."""
    task = LanguageModeling(tokenizer(), train=TEXTS, max_length=6, stride=3)
    found = token_uncertainty(posterior, task.train, num_draws=2)
    stream = LanguageModeling(tokenizer(), train=TEXTS, max_length=64).train[0]["input_ids"]
    assert found["token"].tolist() == stream[1:]


def test_one_draw_has_no_doubt_of_its_own(posterior: Posterior) -> None:
    """Law: with mean weights or a point estimate mutual information is exactly 0 and the log probability its mean."""
    task = posterior.program.task
    assert task is not None
    for own in (posterior, language_posterior(MAP())):
        found = token_uncertainty(own, task.train, num_draws=0 if own is posterior else 4)
        assert (found["mutual_information"] == 0).all() and (found["effective_draws"] == 1).all()
        np.testing.assert_allclose(found["log_prob"], found["expected_log_prob"])


def test_draws_are_held_one_at_a_time(posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: no tensor of the vocabulary has more rows than a batch: draws are never stacked."""
    task = posterior.program.task
    assert task is not None
    monkeypatch.setattr(Runner, "evaluate", lambda *_: pytest.fail("draws were stacked"))
    seen = []
    whole = posterior.program.logits

    def logits(draws, batch):
        seen.append(whole(draws, batch))
        return seen[-1]

    monkeypatch.setattr(posterior.program, "logits", logits)
    token_uncertainty(posterior, task.train, num_draws=4, batch_size=2)
    assert len(seen) == 4 * -(-len(task.train) // 2) and max(len(values) for values in seen) == 2


@pytest.mark.parametrize("kind", ["words", "sentencepiece"])
def test_pieces_are_the_text(kind: str) -> None:
    """Law: the pieces of all tokens, joined, are the decoded text, also where a character is several tokens."""
    if kind == "sentencepiece" and not STORIES.is_dir():
        pytest.skip("the small Llama is not here")
    read = tokenizer() if kind == "words" else AutoTokenizer.from_pretrained(STORIES)
    for text in ("the cold stone lies, unmoved", "Zoë said: “naïve” 日本!", "a  b\nc"):
        ids = read(text, verbose=False)["input_ids"]
        found = _pieces(read, ids)
        assert len(found) == len(ids) and "".join(found) == read.decode(ids)


def test_classes_and_other_weights_are_refused(posterior: Posterior) -> None:
    """Law: a task over classes has no next tokens, and weights have two names; the errors say so."""
    program, guide = tiny_program(), MAP()
    guide.bind(program)
    assert program.task is not None and posterior.program.task is not None
    with pytest.raises(ValueError, match=r"here is Categorical\. For classes use posterior\.predict"):
        token_uncertainty(Posterior(program, guide), program.task.train)
    with pytest.raises(ValueError, match="uniform, not 'other'"):
        token_uncertainty(posterior, posterior.program.task.train, weights="other")  # type: ignore[arg-type]
