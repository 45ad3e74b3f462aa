"""Language models: perplexity per token of the posterior predictive, and what averaging over draws adds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from pyrolora.diagnostics.bootstrap import Estimate, FloatArray, percentile_estimate, resamples
from pyrolora.inference.posterior import Posterior
from pyrolora.likelihoods.next_token import NextToken

_BOOTSTRAP = 1000


@dataclass(frozen=True)
class LanguageEvaluation:
    """What one posterior scores on running text.

    Attributes:
        perplexity: ``exp`` of the nats per token, with a 95 % bootstrap interval over blocks of text.
        nats_per_token: ``−Σ_n log p̄(w_n) / Σ_n T_n``.
        mean_weights: Perplexity of the mean weights; None for a point estimate.
        by_draws: Perplexity of the first 1, 4, 16, … S draws.
        num_draws: S.
        num_blocks: Blocks of text.
        num_tokens: Tokens that are scored.
    """

    perplexity: Estimate
    nats_per_token: Estimate
    mean_weights: float | None
    by_draws: dict[int, float]
    num_draws: int
    num_blocks: int
    num_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        p, nats = self.perplexity, self.nats_per_token
        lines = [
            f"{self.num_tokens} tokens in {self.num_blocks} blocks, {self.num_draws} draw(s), 95 % intervals",
            f"  perplexity     {p.value:.3f}  [{p.low:.3f}, {p.high:.3f}]",
            f"  nats per token {nats.value:.4f}  [{nats.low:.4f}, {nats.high:.4f}]",
        ]
        if self.mean_weights is not None:
            steps = ", ".join(f"{value:.3f} with {size}" for size, value in self.by_draws.items())
            lines.append(f"perplexity: {self.mean_weights:.3f} with mean weights, {steps}")
        return "\n".join(lines)


def evaluate_language(
    posterior: Posterior, data: Dataset, *, num_draws: int = 16, seed: int = 0, batch_size: int = 32
) -> LanguageEvaluation:
    """Perplexity of a language model's posterior predictive.

    A draw explains a whole block: ``p̄(w) = 1/S Σ_s Π_t p(w_t | w_<t, θ_s)``, which is the product of next-token
    probabilities averaged over draws that are weighted by how well they explained the text so far.

    Args:
        posterior: Over a program with the `NextToken` likelihood.
        data: A tokenised split.
        num_draws: S; 0 for the mean weights.
        seed: Of the draws and of the bootstrap.
        batch_size: Blocks at once.

    Raises:
        ValueError: Another likelihood, or a posterior without a task.
    """
    likelihood, task = posterior.program.likelihood, posterior.program.task
    if not isinstance(likelihood, NextToken) or task is None:
        raise ValueError(
            f"perplexity is of next tokens; the likelihood here is {type(likelihood).__name__}. Use evaluate_posterior"
        )
    plain = data.remove_columns([name for name in ("text",) if name in data.column_names])
    counts = [likelihood.tokens(task.collate([plain[i]])).sum() for i in range(len(plain))]
    tokens = torch.stack(counts).double().numpy()
    draws = posterior.log_likelihood(data, num_draws, seed=seed, batch_size=batch_size).double()
    averaged = num_draws > 0 and posterior.guide.averages
    mean = posterior.log_likelihood(data, 0, batch_size=batch_size).double() if averaged else None
    sizes = [4**i for i in range(len(draws).bit_length()) if 4**i < len(draws)] + [len(draws)]
    scores = {size: mixture(draws[:size]) for size in sizes}
    nats = nats_per_token(scores[len(draws)], tokens, seed=seed)
    return LanguageEvaluation(
        perplexity=Estimate(*(perplexity(value) for value in (nats.value, nats.low, nats.high))),
        nats_per_token=nats,
        mean_weights=None if mean is None else perplexity(-float(mean.sum()) / tokens.sum()),
        by_draws={size: perplexity(-score.sum() / tokens.sum()) for size, score in scores.items()},
        num_draws=len(draws),
        num_blocks=len(tokens),
        num_tokens=int(tokens.sum()),
    )


def perplexity(nats: float) -> float:
    """``exp`` of nats per token; infinite beyond 709 nats, where a float ends."""
    with np.errstate(over="ignore"):
        return float(np.exp(nats))


def mixture(log_likelihood: torch.Tensor) -> FloatArray:
    """``log 1/S Σ_s p(w_n | θ_s)`` in nats of draws ``(S, n)``; ``(n,)``."""
    return (log_likelihood.logsumexp(0) - math.log(len(log_likelihood))).numpy()


def nats_per_token(scores: FloatArray, tokens: NDArray[np.float64], *, seed: int = 0) -> Estimate:
    """``−Σ_n score_n / Σ_n T_n``, and its interval over resamples of the blocks (scores and lengths together)."""
    rows = resamples([len(scores)], num_bootstrap=_BOOTSTRAP, seed=seed)
    values = np.concatenate([-scores[chosen].sum(-1) / tokens[chosen].sum(-1) for (chosen,) in rows])
    return percentile_estimate(float(-scores.sum() / tokens.sum()), values)
