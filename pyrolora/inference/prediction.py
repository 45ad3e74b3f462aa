"""What a posterior says about inputs: class probabilities and their uncertainty, split by source."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from torch import Tensor

KEPT_VALUES = 50_000_000
SHOWN_ROWS = 20


@dataclass(frozen=True)
class Prediction:
    """Posterior predictive over classes, averaged over draws in probability.

    ``p(y | x) = (1/S) Σ_s softmax(f(x; θ_s))``. All uncertainties are in nats.

    Attributes:
        log_mean: ``log p(y | x)``, ``(n, K)``.
        entropy: Total uncertainty ``H[E p]``, ``(n,)``.
        expected_entropy: Aleatoric part ``E H[p]``, ``(n,)``.
        variance: Variance over draws of each class probability, ``(n, K)``; zero for a single draw.
        num_draws: S.
        draws: ``log softmax(f(x; θ_s))``, ``(S, n, K)``, or None when it would exceed 50 million numbers.
        labels: What was observed, ``(n,)``, −1 where unknown; or None.
        texts: What a person would read, one for each row, or None.
        class_names: Of the K classes.
        joint: Whether a draw is one value of the weights, the same for every input. Not so for linearised Laplace: its
            draws are quasi-Monte Carlo points of each input's own predictive. They average to it, but are not
            independent, and point s of one input has nothing to do with point s of another.
        scaling: Temperature τ at which the mean predictive stands, see `scaled`; draws are those before it.
        inputs: What the guide says of each input by itself, ``{name: (n, layers)}``: for `InputAdaptive` the α of every
            layer, ``lora.query.A.alpha``. Empty for most guides.

    Source of the decomposition: Depeweg et al. 2018, section 3.
    """

    log_mean: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    variance: Tensor
    num_draws: int
    draws: Tensor | None
    labels: Tensor | None
    texts: tuple[str, ...] | None
    class_names: tuple[str, ...]
    joint: bool = True
    scaling: float = 1.0
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def mean(self) -> Tensor:
        """``p(y | x)``, ``(n, K)``."""
        return self.log_mean.exp()

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic part ``I[y; θ | x] = H[E p] − E H[p]`` in nats, ``(n,)``, never below zero."""
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @property
    def monte_carlo_error(self) -> Tensor:
        """Standard error of ``mean`` from the finite number of draws, ``(n, K)``: ``√(variance / S)``.

        Far too large where the draws are not `joint`: quasi-Monte Carlo points average better than independent draws.
        """
        return (self.variance / self.num_draws).sqrt()

    def __len__(self) -> int:
        return self.log_mean.shape[0]

    def scaled(self, temperature: float) -> Prediction:
        """The prediction at another temperature: ``log p_τ(k) = log p(k)/τ − log Σ_j p(j)^{1/τ}``; 1 changes nothing.

        Only the mean predictive is scaled. Draws and their variance stay, and with them the mutual information (unless
        the scaled entropy falls below it): whatever the temperature adds or takes counts as aleatoric.
        """
        if temperature == 1:
            return self
        log_mean = (self.log_mean / temperature).log_softmax(-1)
        entropy = torch.special.entr(log_mean.exp()).sum(-1)
        aleatoric = (entropy - self.mutual_information).clamp(min=0)
        scaling = self.scaling * temperature
        return replace(self, log_mean=log_mean, entropy=entropy, expected_entropy=aleatoric, scaling=scaling)

    def to_pandas(self) -> pd.DataFrame:
        """One row for each input: text, label, predicted class, its probability, the uncertainties, means of inputs."""
        names = self.class_names or tuple(str(k) for k in range(self.log_mean.shape[1]))
        best = self.log_mean.argmax(-1)
        columns: dict[str, Any] = {} if self.texts is None else {"text": list(self.texts)}
        if self.labels is not None:
            columns["label"] = [names[y] if y >= 0 else None for y in self.labels.tolist()]
        columns["predicted"] = [names[k] for k in best.tolist()]
        columns["confidence"] = self.mean.gather(-1, best.unsqueeze(-1)).squeeze(-1).numpy()
        columns |= {f"p({name})": self.mean[:, k].numpy() for k, name in enumerate(names)}
        columns["entropy"] = self.entropy.numpy()
        columns["mutual_information"] = self.mutual_information.numpy()
        columns |= {name: value.mean(-1).numpy() for name, value in self.inputs.items()}
        return pd.DataFrame(columns)

    def to_dataset(self) -> datasets.Dataset:
        """The same table as a `datasets.Dataset`."""
        return datasets.Dataset.from_pandas(self.to_pandas(), preserve_index=False)

    def _repr_html_(self) -> str:
        table = self.to_pandas().head(SHOWN_ROWS).to_html(index=False, float_format=lambda v: f"{v:.3f}", escape=True)
        more = f"<p>{SHOWN_ROWS} of {len(self)} rows; to_pandas() has all.</p>" if len(self) > SHOWN_ROWS else ""
        return f"<p>{html.escape(repr(self))}</p>{table}{more}"

    def __repr__(self) -> str:
        draws = "draws" if self.joint else "quasi-Monte Carlo points"
        return (
            f"Prediction({len(self)} inputs, {self.log_mean.shape[1]} classes, {self.num_draws} {draws}; mean entropy "
            f"{self.entropy.mean():.3f}, mean mutual information {self.mutual_information.mean():.4f} nats)"
        )


class PredictionBuilder:
    """Builds a `Prediction` batch by batch; keeps the draws only below a size."""

    def __init__(self, num_inputs: int, num_draws: int, class_names: Sequence[str] = (), *, joint: bool = True):
        self.num_inputs = num_inputs
        self.num_draws = num_draws
        self.class_names = tuple(class_names)
        self.joint = joint
        self._parts: list[dict[str, Tensor]] = []

    def add(self, log_probabilities: Tensor) -> None:
        """Adds ``log softmax`` of one batch under every draw, ``(S, b, K)``."""
        log_p = log_probabilities.float()
        p = log_p.exp()
        log_mean = log_p.logsumexp(0) - np.log(log_p.shape[0])
        part = {
            "log_mean": log_mean,
            "entropy": torch.special.entr(log_mean.exp()).sum(-1),
            "expected_entropy": torch.special.entr(p).sum(-1).mean(0),
            "variance": p.var(0) if len(p) > 1 else torch.zeros_like(log_mean),
        }
        if self.num_inputs * log_p.shape[0] * log_p.shape[2] <= KEPT_VALUES:
            part["draws"] = log_p.transpose(0, 1)
        self._parts.append({name: value.cpu() for name, value in part.items()})

    def build(self, order: Tensor, columns: Mapping[str, Any]) -> Prediction:
        """Joins the batches.

        Args:
            order: Position in the data of each row added, ``(n,)``.
            columns: ``labels`` and ``text`` of the data, where it has them.
        """
        back = torch.argsort(order)
        joined: dict[str, Any] = {
            name: torch.cat([part[name] for part in self._parts])[back] for name in self._parts[0]
        }
        draws = joined.pop("draws", None)
        labels, texts = columns.get("labels"), columns.get("text")
        return Prediction(
            **joined,
            num_draws=self.num_draws,
            draws=None if draws is None else draws.transpose(0, 1).contiguous(),
            labels=None if labels is None else torch.as_tensor(labels),
            texts=None if texts is None else tuple(texts),
            class_names=self.class_names,
            joint=self.joint,
        )
