"""What a likelihood is: how data arise given the base model's output."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


class Likelihood(ABC):
    """How data arise given the base model's output; the owner of the data site.

    A likelihood turns the model's output into natural parameters ``f`` (:meth:`logits`) and says what ``p(y | f)``
    is (:meth:`distribution`). Every method works under ``torch.vmap`` over draws of ``f``: none of them looks at the
    values of the logits to decide what to do. Batches are checked once, by the task, not here.

    Constructor arguments are JSON-able and are stored under their own names, so that a likelihood can be saved.
    """

    site: ClassVar[str] = "labels"
    # How many draws of the natural parameters predictions hold at once, unless told otherwise.
    draws_at_once: ClassVar[int] = 8

    def forward_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What goes to the base model: the tensors of the batch, without the observation.

        Labels stay behind because a Hugging Face model that sees them computes a loss of its own.
        """
        return {key: value for key, value in batch.items() if key != self.site and isinstance(value, Tensor)}

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """Runs the base model on a batch: natural parameters over the support, in float32."""
        return self.logits(model(**self.forward_inputs(batch)), batch)

    @abstractmethod
    def logits(self, output: Any, batch: Batch) -> Tensor:
        """Natural parameters over the support, in float32, from a Hugging Face ``ModelOutput``."""

    def sample_parameters(self) -> dict[str, Tensor]:
        """The likelihood's own global latent sites, drawn with ``pyro.sample``; ``{name of the site: value}``."""
        return {}

    @abstractmethod
    def distribution(self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> TorchDistributionMixin:
        """``p(y | f)`` as a Pyro distribution; batch shape (b,)."""

    def observation(self, batch: Batch) -> Tensor | None:
        """The observed value of the data site, or ``None`` where the batch has no labels (then it is sampled)."""
        return batch.get(self.site)

    def observe(self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> None:
        """Put the data site in the trace; to be called inside the data plate."""
        pyro.sample(self.site, self.distribution(logits, parameters, batch), obs=self.observation(batch))

    def log_prob(self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """``log p(y_n | f_n)`` of each example in nats; shape (b,)."""
        return self.distribution(logits, parameters, batch).log_prob(self.observation(batch))

    @abstractmethod
    def probabilities(self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Class probabilities; shape (b, K).

        Raises:
            NotImplementedError: for a likelihood that is not over classes.
        """

    def log_probabilities(self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Logarithms of the class probabilities, precise also where a probability underflows; shape (b, K)."""
        return self.probabilities(logits, parameters, batch).log()

    def fisher_factors(
        self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch, *, exact_up_to: int = 32
    ) -> Iterator[Tensor]:
        """Vectors v with ``E Σ v vᵀ = E_y[∇_f log p(y|f) ∇_f log p(y|f)ᵀ]``, the Fisher information of ``f``.

        Here one score at one ``y`` drawn from the model itself: exact in expectation for every likelihood.

        Args:
            logits: Natural parameters, detached.
            parameters: The likelihood's own.
            batch: The inputs.
            exact_up_to: The largest number of vectors for which an exact sum is worth its cost.

        Yields:
            Tensors of the shape of ``logits``.
        """
        with torch.enable_grad():
            f = logits.detach().requires_grad_()
            law = self.distribution(f, parameters, batch)
            drawn = law.sample().detach()
            (score,) = torch.autograd.grad(law.log_prob(drawn).sum(), f)
        yield score

    def check_logits(self, logits: Tensor) -> None:
        """Look at the logits of one batch, once, before training.

        Raises:
            ValueError: some are not finite.
        """
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                f"{type(self).__name__}: the model's output has NaN or infinite values before any training; check the "
                "checkpoint, or load the base model in float32 or bfloat16 instead of float16."
            )


class ClassLikelihood(Likelihood):
    """A likelihood over K classes: ``p(y = k | f) = softmax(f)_k``.

    Shapes: logits (b, K), labels (b,) of int64 in 0..K-1. A negative label means *no class is known* (an
    out-of-distribution example, say): its log probability is NaN, never a number that could enter an average.
    """

    def distribution(self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> TorchDistributionMixin:
        """``Categorical(logits = f)``; batch shape (b,)."""
        return dist.Categorical(logits=logits, validate_args=False)

    def log_prob(self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """``log softmax(f_n)[y_n]`` in nats, NaN where the label is negative; shape (b,)."""
        labels = batch[self.site]
        chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.where(labels >= 0, chosen, torch.nan)

    def probabilities(self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """``softmax(f)``; shape (b, K)."""
        return logits.softmax(-1)

    def log_probabilities(self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """``log softmax(f)``; shape (b, K)."""
        return logits.log_softmax(-1)

    def fisher_factors(
        self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch, *, exact_up_to: int = 32
    ) -> Iterator[Tensor]:
        """K − 1 vectors whose outer products sum to ``diag p − p pᵀ``, which has no more than that rank; or one draw.

        ``√(p_c s_c / (p_c + s_c)) (e_c − Σ_{i>c} (p_i / s_c) e_i)``, ``s_c = Σ_{i>c} p_i``: each class against the mean
        of those after it. Source: Tanabe & Sagae 1992 (Cholesky factor of a multinomial's covariance).
        """
        if logits.shape[-1] > exact_up_to:
            yield from super().fisher_factors(logits, parameters, batch, exact_up_to=exact_up_to)
            return
        p = logits.detach().softmax(-1)
        # A sum over what follows, not 1 minus what came before: small probabilities keep their digits.
        sums = p.flip(-1).cumsum(-1).flip(-1).clamp(min=torch.finfo(p.dtype).tiny)
        for c in range(p.shape[-1] - 1):
            later = sums[:, c + 1 : c + 2]
            vector = -p / later
            vector[:, :c] = 0
            vector[:, c] = 1
            yield (p[:, c : c + 1] * later / sums[:, c : c + 1]).sqrt() * vector

    def check_logits(self, logits: Tensor) -> None:
        """Warn where the rows are probabilities already: a second softmax would flatten every prediction.

        Rows count as probabilities when none is negative and each sums to 1 within 1e-3; a single class has nothing
        to flatten.
        """
        super().check_logits(logits)
        rows = logits.detach().float().reshape(-1, logits.shape[-1])
        if rows.shape[-1] < 2 or rows.shape[0] == 0:
            return
        if bool((rows >= 0).all()) and bool(((rows.sum(-1) - 1).abs() < 1e-3).all()):
            warnings.warn(
                f"{type(self).__name__} was given probabilities, not logits: every row of the model's output is "
                "non-negative and sums to 1, so a softmax would be applied twice. Take the softmax out of the model, "
                "or return log-probabilities.",
                UserWarning,
                stacklevel=2,
            )
