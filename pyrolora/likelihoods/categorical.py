"""Classification: one of K classes from a K-way head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyrolora.likelihoods.base import Batch, ClassLikelihood


class Categorical(ClassLikelihood):
    """One of K classes from a head with K outputs: ``p(y = k | f) = softmax(f)_k``.

    Serves sequence classification heads and multiple-choice heads alike; both return (b, K).

    Args:
        num_classes: K, at least 2.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 2:
            raise ValueError(
                f"Categorical needs at least 2 classes, not {num_classes}; a number to predict is Normal's."
            )
        self.num_classes = int(num_classes)

    def logits(self, output: Any, batch: Batch) -> Tensor:
        """The head's logits in float32; shape (b, K)."""
        return output.logits.float()
