"""Kronecker factors of the Fisher information of adapter matrices, in one pass over the data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrolora.adapters.sites import SiteGroup
from pyrolora.program import PyroLoRA, evaluating

Tokens = Literal["reduce", "expand", "last"]


@dataclass
class Factors:
    """Sums for ``F ≈ Ā ⊗ S̄`` of one site: one side small and dense, the large one at rank k with its exact trace.

    Attributes:
        small: ``Σ rows rowsᵀ`` of the small side, ``(layers, s, s)``.
        sketch: ``U √β`` of the large side's sum, ``(layers, n, k)``.
        trace: Of the large side's sum, exact, ``(layers,)``.
        weight: What ``Ā`` is divided by: examples, or tokens in expanded form.
        rank: k.
    """

    small: Tensor
    sketch: Tensor
    trace: Tensor
    weight: float = 0.0
    rank: int = 10

    @classmethod
    def empty(cls, layers: int, small: int, large: int, *, rank: int, device: torch.device) -> Factors:
        """Sums over no data."""
        zeros: Callable[..., Tensor] = lambda *shape: torch.zeros(shape, device=device)  # noqa: E731
        return cls(zeros(layers, small, small), zeros(layers, large, 0), zeros(layers), rank=min(rank, large))

    def add_small(self, rows: Tensor) -> None:
        """Adds ``(layers, m, s)`` rows of the small side."""
        self.small += rows.mT @ rows

    def add_large(self, rows: Tensor) -> None:
        """Adds ``(layers, m, n)`` rows of the large side, and truncates to rank k by a small Gram matrix."""
        self.trace += rows.square().sum((-2, -1))
        self.sketch = truncated(torch.cat([self.sketch, rows.mT], -1), self.rank)

    def merge(self, other: Factors) -> Factors:
        """The sums of two workers: small sides and traces add, sketches are stacked and truncated."""
        sketch = truncated(torch.cat([self.sketch, other.sketch], -1), self.rank)
        return Factors(
            self.small + other.small, sketch, self.trace + other.trace, self.weight + other.weight, self.rank
        )


def truncated(columns: Tensor, rank: int) -> Tensor:
    """The best rank-k factor W with ``W Wᵀ ≈ X Xᵀ``, by the eigenvectors of ``Xᵀ X``; ``(layers, n, ≤ k)``."""
    if columns.shape[-1] <= rank:
        return columns
    _, vectors = torch.linalg.eigh((columns.mT @ columns).double())
    return columns @ vectors[..., -rank:].to(columns.dtype)


class Recorder:
    """Inputs and outputs of the modules that hold the random matrices, caught by forward hooks.

    Args:
        program: The Pyro model.
        sites: The sites whose modules are watched.
    """

    def __init__(self, program: PyroLoRA, sites: Sequence[SiteGroup]):
        self.program = program
        self.sites = list(sites)
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._recording = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on, for the duration of the block."""
        with contextlib.ExitStack() as stack:
            for site in self.sites:
                for path, _ in site.holders:
                    module = self.program.model.get_submodule(path)
                    if not isinstance(module, nn.Linear):
                        raise ValueError(
                            f"{path} is no linear map ({type(module).__name__}): Laplace cannot serve {site.name!r}; "
                            "leave it out of `random`"
                        )
                    stack.callback(module.register_forward_hook(self._hook(path)).remove)
            yield

    def run(self, values: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """One forward pass; returns the natural parameters, on the graph."""
        self.inputs, self.outputs = {}, {}
        self._recording = True
        try:
            return self.program.logits(values, batch)
        finally:
            self._recording = False

    def gradients(self, logits: Tensor, vector: Tensor, *, keep: bool) -> dict[str, Tensor]:
        """``∂(v · f)/∂ output`` of every watched module."""
        paths = list(self.outputs)
        found = torch.autograd.grad((logits * vector).sum(), [self.outputs[p] for p in paths], retain_graph=keep)
        return dict(zip(paths, found, strict=True))

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # Activation checkpointing runs the module again in backward: that is the same evaluation.
            if self._recording:
                self.inputs[path], self.outputs[path] = inputs[0].detach(), output

        return note


@dataclass
class Reduction:
    """How the tokens of an example enter its factors, ``reduce``, ``expand`` or ``last``; padding never does.

    ``reduce``: the mean input and the summed gradient of an example. Its exact gradient is ``Σ_t g_t a_tᵀ``, which this
    keeps together; ``expand`` takes every token for an example of its own, and ``last`` the last one alone.
    """

    kind: Tokens
    size: int
    mask: Tensor | None = field(default=None)

    def inputs(self, value: Tensor) -> Tensor:
        """``(rows, features)`` of the input side; reduced, the mean over an example's tokens."""
        tokens, real = self._tokens(value)
        rows = self._rows(tokens, real)
        return rows / real.sum(1, keepdim=True).clamp(min=1) if self.kind == "reduce" else rows

    def gradients(self, value: Tensor) -> Tensor:
        """``(rows, features)`` of the output side; reduced, the sum over an example's tokens."""
        return self._rows(*self._tokens(value))

    def weight(self, value: Tensor) -> float:
        """How many rows the input side counts for."""
        return float(self._tokens(value)[1].sum()) if self.kind == "expand" else float(self.size)

    def _tokens(self, value: Tensor) -> tuple[Tensor, Tensor]:
        tokens = value.detach().reshape(self.size, -1, value.shape[-1]).float()
        if self.mask is not None and self.mask.numel() == tokens.shape[0] * tokens.shape[1]:
            return tokens, self.mask.reshape(self.size, -1).to(tokens)
        # A head sees one row for an example, and the cross-attention of a decoder other tokens than the mask's.
        return tokens, tokens.new_ones(tokens.shape[:2])

    def _rows(self, tokens: Tensor, real: Tensor) -> Tensor:
        if self.kind == "expand":
            return tokens[real.bool()]
        if self.kind == "reduce":
            return (tokens * real.unsqueeze(-1)).sum(1)
        last = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1)
        return tokens[torch.arange(len(tokens), device=tokens.device), last]


def batches(program: PyroLoRA, data: Dataset, batch_size: int, *, label: str) -> Iterator[dict[str, Tensor]]:
    """The data in collated batches on the program's device, with a progress bar."""
    assert program.task is not None
    plain = data.remove_columns([c for c in ("text",) if c in data.column_names])
    for start in tqdm(range(0, len(data), batch_size), desc=label, delay=3, leave=False):
        rows = [plain[i] for i in range(start, min(start + batch_size, len(data)))]
        yield {name: value.to(program.device) for name, value in program.task.collate(rows).items()}


def curvature(
    program: PyroLoRA,
    values: Mapping[str, Tensor],
    sites: Sequence[SiteGroup],
    data: Dataset,
    *,
    rank: int = 10,
    tokens: Tokens = "reduce",
    exact_up_to: int = 32,
    batch_size: int = 16,
) -> tuple[dict[str, Factors], Tensor]:
    """Factors of ``F = Σ_n J_nᵀ Λ_n J_n`` at given weights, Λ the Fisher information of the natural parameters.

    One forward pass and, for each vector of `Likelihood.fisher_factors`, one backward pass to the watched modules'
    outputs: K for K classes up to ``exact_up_to``, one above. The model is in evaluation mode.

    Args:
        program: The Pyro model.
        values: All its latent sites; those of ``sites`` with a gradient.
        sites: The sites to approximate; matrices of linear maps.
        data: A tokenised split.
        rank: Of the large side.
        tokens: See `Reduction`.
        exact_up_to: The largest number of classes for which the Fisher information is exact.
        batch_size: Rows at once; the result does not depend on it but for round-off and truncation.

    Returns:
        Factors by site, and ``Σ_n log p(y_n | x_n, θ)`` in nats.

    Source: Martens & Grosse 2015; Eschenhagen et al. 2023 (reduce and expand); Yang et al. 2024, section 3.
    """
    recorder = Recorder(program, sites)
    found = {site.name: _empty(site, rank=rank, device=program.device) for site in sites}
    parameters = {name: value.detach() for name, value in values.items() if name not in program.sites}
    total = torch.zeros((), device=program.device)
    with evaluating(program.model), recorder.watching(), torch.enable_grad():
        for batch in batches(program, data, batch_size, label="curvature"):
            logits = recorder.run(values, batch)
            with torch.no_grad():
                total += program.likelihood.log_prob(logits.detach(), parameters, batch).sum()
            reduction = Reduction(tokens, len(logits), batch.get("attention_mask"))
            for site in sites:
                _add_inputs(found[site.name], site, recorder, reduction)
            vectors = list(
                program.likelihood.fisher_factors(logits.detach(), parameters, batch, exact_up_to=exact_up_to)
            )
            for i, vector in enumerate(vectors):
                gradients = recorder.gradients(logits, vector, keep=i + 1 < len(vectors))
                for site in sites:
                    rows = torch.stack([reduction.gradients(gradients[path]) for path, _ in site.holders])
                    _add(found[site.name], rows, large=not large_is_input(site))
    return found, total


def large_is_input(site: SiteGroup) -> bool:
    """Whether the input side of a matrix ``(out, in)`` is its large one: of A and of heads it is, of B it is not."""
    rows, columns = site.event_shape
    return columns >= rows


def _empty(site: SiteGroup, *, rank: int, device: torch.device) -> Factors:
    small, large = sorted(site.event_shape)
    return Factors.empty(site.num_layers, small, large, rank=rank, device=device)


def _add_inputs(factors: Factors, site: SiteGroup, recorder: Recorder, reduction: Reduction) -> None:
    inputs = [recorder.inputs[path] for path, _ in site.holders]
    factors.weight += reduction.weight(inputs[0])
    _add(factors, torch.stack([reduction.inputs(value) for value in inputs]), large=large_is_input(site))


def _add(factors: Factors, rows: Tensor, *, large: bool) -> None:
    if large:
        factors.add_large(rows)
    else:
        factors.add_small(rows)
