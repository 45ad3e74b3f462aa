"""Answers of a causal language model that are one token each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyrolora.adapters.head import narrowed_head
from pyrolora.likelihoods.base import Batch, ClassLikelihood


class AnswerTokens(ClassLikelihood):
    """One of K answers, each a single token, as a causal language model's next token.

    ``p(y = k | f) = softmax(f)_k`` with ``f_k`` = the logit of answer token k at the last real position of the
    prompt. The softmax is over the K answers, not over the vocabulary: the posterior is over what can be answered.

    :meth:`evaluate` has the model's output layer compute those alone; :meth:`logits` takes them from all.

    Shapes: model output (b, T, V), logits (b, K). Rows may be padded on either side; without an attention mask
    every position is real.

    Args:
        token_ids: the K answer tokens, in the order of the classes.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = tuple(int(token) for token in token_ids)
        if len(self.token_ids) < 2:
            raise ValueError(f"AnswerTokens needs at least 2 answer tokens, not {self.token_ids}.")
        if len(set(self.token_ids)) < len(self.token_ids):
            raise ValueError(f"two answers share a token in {self.token_ids}: they could not be told apart.")

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """The answers' logits, of which alone the output layer computes what it can; shape (b, K)."""
        ids = batch["input_ids"]
        with narrowed_head(model, self._last(batch, ids), self.token_ids) as selected:
            output = model(**self.forward_inputs(batch))
        return selected(output.logits).float()

    def logits(self, output: Any, batch: Batch) -> Tensor:
        """The answer tokens' logits after the last real token of each row, in float32; shape (b, K)."""
        scores = output.logits
        tokens = torch.tensor(self.token_ids, device=scores.device)
        return scores[torch.arange(scores.shape[0], device=scores.device), self._last(batch, scores)][:, tokens].float()

    @staticmethod
    def _last(batch: Batch, values: Tensor) -> Tensor:
        """Index of each row's last real token, of values ``(b, T, ...)``; shape (b,)."""
        length = values.shape[1]
        mask = batch.get("attention_mask")
        if mask is None:
            return torch.full((values.shape[0],), length - 1, device=values.device)
        return length - 1 - mask.flip(-1).long().argmax(-1)
