"""Next-token language modelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyrolora.likelihoods.base import Batch, Likelihood

IGNORED = -100


class NextToken(Likelihood):
    """A causal language model's text: ``log p(w | f) = Σ_t log softmax(f_t)[w_{t+1}]`` over the real next tokens.

    One example is one sequence; its log probability is the *sum* over its tokens in nats, so that longer texts
    count for more, as they do in the joint density. Labels are the input tokens, with −100 where a token is padding
    or is context only.

    Shapes: model output (b, T, V), logits (b, T−1, V), labels (b, T), distribution batch shape (b,), event (T−1,).
    """

    # One draw's logits have the vocabulary as an axis: 1.6 GB for 32 blocks of 256 tokens of GPT-2.
    draws_at_once: ClassVar[int] = 1

    def logits(self, output: Any, batch: Batch) -> Tensor:
        """The next-token logits of every position but the last, in float32; shape (b, T−1, V)."""
        return output.logits[:, :-1].float()

    def scored(self, batch: Batch) -> Tensor:
        """Which next tokens count, as booleans; shape (b, T−1).

        A token counts when it is real and so is the one before it: after left padding nothing real predicts the
        first token of a text.
        """
        labels, mask = batch.get(self.site), batch.get("attention_mask")
        tokens = batch["input_ids"] if labels is None else labels
        real = tokens[:, 1:] != IGNORED
        return real if mask is None else real & mask[:, 1:].bool() & mask[:, :-1].bool()

    def observation(self, batch: Batch) -> Tensor | None:
        """The next tokens (0 where they do not count), or ``None`` without labels; shape (b, T−1)."""
        labels = batch.get(self.site)
        return None if labels is None else labels[:, 1:].clamp(min=0)

    def distribution(self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> TorchDistributionMixin:
        """Independent next tokens given the text before each; batch shape (b,), event shape (T−1,)."""
        tokens = dist.Categorical(logits=logits, validate_args=False)
        return tokens.mask(self.scored(batch)).to_event(1)

    def log_prob(self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """``Σ_t log p(w_{t+1} | w_{≤t})`` over the tokens that count, in nats; shape (b,)."""
        labels = batch[self.site][:, 1:]
        # Tokens in one row each: with the vocabulary in the middle the kernel would copy all logits once more.
        nats = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return torch.where(self.scored(batch), nats.view(labels.shape), 0.0).sum(-1)

    def tokens(self, batch: Batch) -> Tensor:
        """How many tokens of each text are scored: the divisor for nats per token and perplexity; shape (b,)."""
        return self.scored(batch).sum(-1)

    def probabilities(self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> NoReturn:
        """Not defined: the support is every text, not K classes."""
        raise NotImplementedError(
            "NextToken has no class probabilities; use log_prob (nats per text; divide by tokens(batch) for nats per "
            "token), or AnswerTokens where the answer is one of a few tokens."
        )
