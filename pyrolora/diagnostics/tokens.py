"""Language models: what a posterior says of each token of a given text, and how much of it is its own doubt."""

from __future__ import annotations

from typing import get_args

import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pyrolora.inference.generate import Weights
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.predict import Runner
from pyrolora.likelihoods.base import Batch
from pyrolora.likelihoods.next_token import NextToken
from pyrolora.tasks.text import TextTask


def token_uncertainty(
    posterior: Posterior,
    data: Dataset,
    *,
    num_draws: int = 16,
    weights: Weights = "uniform",
    seed: int = 0,
    batch_size: int = 8,
) -> pd.DataFrame:
    """Each token of given text under the posterior predictive ``p(w_t | w_<t) = Σ_s π_s(t) p(w_t | w_<t, θ_s)``.

    With ``weights="uniform"``, ``π_s = 1/S``: doubt about each token afresh, so that early and late ones
    compare. With ``weights="predictive"``, ``π_s(t) ∝ Π_{u<t} p(w_u | w_<u, θ_s)``: log probabilities sum to those of
    rows, ``log 1/S Σ_s Π_t p(w_t | w_<t, θ_s)``, as in `evaluate_language`; draws that read the text badly fade.

    Entropies are those before a token is read, whichever comes. Of the token that came speak ``log_prob`` and, never
    below 0, ``log_prob - expected_log_prob``: how far the draws disagree about it.

    In memory are about five ``(batch_size, T, V)`` for V words of the vocabulary, however many draws and rows.

    Args:
        posterior: Over a program with the `NextToken` likelihood and its task.
        data: A tokenised split.
        num_draws: S; 0 uses the posterior's mean weights. A point estimate runs once.
        weights: Of the draws.
        seed: Of the draws.
        batch_size: Rows at once.

    Returns:
        A row for each token that is scored (a block's first, padding and context are not), in order: ``row``,
        ``position`` in it, ``token``, ``piece`` (what it adds to the text), in nats ``log_prob``, ``expected_log_prob``
        ``Σ_s π_s log p_s(w_t)``, ``entropy`` (total), ``expected_entropy`` (aleatoric, ``Σ_s π_s H[p_s]``),
        ``mutual_information`` (epistemic, their difference); ``effective_draws`` ``1 / Σ_s π_s²``.

    Raises:
        ValueError: Another likelihood, a posterior without a task, other weights, no rows.

    Source of the decomposition: Depeweg et al. 2018, section 3; of tokens, Malinin & Gales 2021.
    """
    likelihood, task = posterior.program.likelihood, posterior.program.task
    if not isinstance(likelihood, NextToken) or not isinstance(task, TextTask):
        raise ValueError(
            f"tokens are scored by the likelihood NextToken and its task; here is {type(likelihood).__name__}. For "
            "classes use posterior.predict"
        )
    if weights not in get_args(Weights):
        raise ValueError(f"weights is one of {', '.join(get_args(Weights))}, not {weights!r}")
    runner, frames = posterior.runner(num_draws, seed=seed), []
    for rows, batch in runner.batches(data, batch_size=batch_size):
        scored = likelihood.scored(batch)
        numbers = _numbers(runner, batch, scored, predictive=weights == "predictive")
        which = torch.tensor(rows).repeat_interleave(scored.sum(-1).cpu())
        frames.append(pd.DataFrame({"row": which, **{name: v[scored].cpu() for name, v in numbers.items()}}))
    table = pd.concat(frames).sort_values(["row", "position"], ignore_index=True)
    pieces = {row: _pieces(task.tokenizer, data[int(row)]["input_ids"]) for row in table["row"].unique()}
    places = zip(table["row"], table["position"], strict=True)
    table.insert(3, "piece", [pieces[row][position] for row, position in places])
    return table


def _numbers(runner: Runner, batch: Batch, scored: Tensor, *, predictive: bool) -> dict[str, Tensor]:
    """The numeric columns of `token_uncertainty` for all tokens of a batch but the first of each row, ``(b, T−1)``."""
    program, ids = runner.program, batch["input_ids"]
    mixture = _Mixture(ids[:, 1:], scored, predictive=predictive)
    for log_p in runner.each(lambda draw, batch: program.logits(draw, batch).log_softmax(-1), batch):
        mixture.add(log_p)
        del log_p  # before the next draw is made
    # Counted from a row's first real token, on whichever side it is padded.
    positions = batch.get("attention_mask", torch.ones_like(ids)).cumsum(-1)[:, 1:] - 1
    return {"position": positions, "token": ids[:, 1:], **mixture.numbers()}


class _Mixture:
    """Weighted means over draws of one batch's ``(b, T)`` tokens, made one draw after another.

    Args:
        tokens: What was read.
        scored: Which of it counts.
        predictive: Whether a draw's weight is its probability of the tokens before.
    """

    def __init__(self, tokens: Tensor, scored: Tensor, *, predictive: bool):
        self._tokens, self._scored, self._predictive = tokens, scored, predictive
        self._log_weight = torch.full(tokens.shape, -torch.inf, dtype=torch.double, device=tokens.device)
        self._log_joint = self._log_weight
        self._expected = self._entropy = self._concentration = torch.zeros_like(self._log_weight)
        self._p = torch.zeros(())

    def add(self, log_p: Tensor) -> None:
        """One more draw: its ``log p(· | w_<t, θ_s)``, ``(b, T, V)``, of which the memory is used again."""
        own = log_p.gather(-1, self._tokens.unsqueeze(-1)).squeeze(-1).double()
        log_weight = self._read(own) if self._predictive else torch.zeros_like(own)
        total = torch.logaddexp(self._log_weight, log_weight)
        share = (log_weight - total).exp()  # of this draw among those so far
        p = log_p.exp_()
        self._entropy = self._entropy.lerp(_entropy(p), share)
        self._expected = self._expected.lerp(own, share)
        self._concentration = self._concentration * (1 - share).square() + share.square()
        self._log_joint = torch.logaddexp(self._log_joint, log_weight + own)
        self._log_weight = total
        self._p = self._p.lerp_(p, share.unsqueeze(-1).to(p)) if self._p.dim() else p

    def numbers(self) -> dict[str, Tensor]:
        """The numbers that depend on the draws, ``(b, T)``."""
        entropy = _entropy(self._p)
        return {
            "log_prob": self._log_joint - self._log_weight,
            "expected_log_prob": self._expected,
            "entropy": entropy,
            "expected_entropy": self._entropy,
            "mutual_information": (entropy - self._entropy).clamp(min=0),
            "effective_draws": 1 / self._concentration,
        }

    def _read(self, own: Tensor) -> Tensor:
        """``Σ_{u<t} log p(w_u | w_<u, θ_s)`` over the tokens that count."""
        counted = torch.where(self._scored, own, 0.0)
        return counted.cumsum(-1) - counted


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1).double()


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What each token adds to the text: together they are the text of all.

    A token is decoded behind the one before it, since tokenizers drop the white space at a text's start. The first
    bytes of a character add nothing; its last ones add the character.
    """
    found: list[str] = []
    start = read = 0
    for end in range(1, len(ids) + 1):
        before, now = (str(tokenizer.decode(ids[start:stop])) for stop in (read, end))
        if now.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(now[len(before) :])
        start, read = read, end
    return found
