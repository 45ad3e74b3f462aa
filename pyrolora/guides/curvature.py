"""Curvature of the log-likelihood in the adapter matrices: one pass over the data with hooks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrolora.adapters.sites import SiteGroup
from pyrolora.guides.factors import DiagonalFactors, Factors, KroneckerFactors, Reduction, Structure, Tokens
from pyrolora.program import PyroLoRA, evaluating

Reduce = Callable[[Tensor, Tensor], Tensor]
"""What is kept of a gradient at a module's output and the module's input."""


class Recorder:
    """Inputs of the modules that hold the random matrices, and gradients at their outputs, caught by hooks.

    Neither the outputs nor their gradients are kept: together they would be as large as the activations.

    Args:
        program: The Pyro model.
        sites: The sites whose modules are watched.
    """

    def __init__(self, program: PyroLoRA, sites: Sequence[SiteGroup]):
        self.program = program
        self.sites = list(sites)
        self.inputs: dict[str, Tensor] = {}
        self._leaves: list[Tensor] = []
        self._found: dict[str, Tensor] = {}
        self._reduce: Reduce | None = None
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
        self.inputs = {}
        self._leaves = [values[site.name] for site in self.sites]
        self._recording = True
        try:
            logits = self.program.logits(values, batch)
        finally:
            self._recording = False
        for site in self.sites:
            for path, _ in site.holders:
                if path not in self.inputs:
                    raise ValueError(
                        f"{path} did not run, so that {site.name!r} has no gradient: is the adapter merged or "
                        "disabled? Call unmerge_adapter() or enable_adapter_layers() on the PEFT model"
                    )
        return logits

    def inputs_of(self, site: SiteGroup) -> list[Tensor]:
        """What the modules of a site were given, layer by layer."""
        return [self.inputs[path] for path, _ in site.holders]

    def gradients(self, logits: Tensor, vector: Tensor, reduce: Reduce, *, keep: bool) -> dict[str, Tensor]:
        """``∂(v · f)/∂ output`` of every watched module by its path, reduced while the backward pass runs.

        Args:
            logits: Of `run`.
            vector: v.
            reduce: Of a gradient and a module's input.
            keep: Whether another vector follows.
        """
        self._found, self._reduce = {}, reduce
        try:
            torch.autograd.grad((logits * vector).sum(), self._leaves, retain_graph=keep, allow_unused=True)
        finally:
            found, self._found, self._reduce = self._found, {}, None
        if missing := [path for path in self.inputs if path not in found]:
            raise ValueError(
                f"no gradient reaches {missing[0]}: the output does not depend on it, or a kernel behind it has no "
                "backward. Leave it out of `random`, or load the base model without that kernel"
            )
        return found

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # Activation checkpointing runs the module again in backward: that is the same evaluation.
            if self._recording:
                self.inputs[path] = inputs[0].detach()
                if output.requires_grad:
                    output.register_hook(functools.partial(self._note, path))

        return note

    def _note(self, path: str, gradient: Tensor) -> None:
        if self._reduce is not None:
            self._found[path] = self._reduce(gradient.detach(), self.inputs[path])


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
    structure: Structure = "low_rank",
    rank: int = 10,
    tokens: Tokens = "whole",
    exact_up_to: int = 32,
    batch_size: int = 16,
) -> tuple[dict[str, Factors], Tensor]:
    """Factors of ``F = Σ_n J_nᵀ Λ_n J_n`` at given weights, Λ the Fisher information of the natural parameters.

    One forward pass and, for each vector of `Likelihood.fisher_factors`, one backward pass to the watched modules'
    outputs: K − 1 for K classes up to ``exact_up_to``, one above. The model is in evaluation mode.

    Args:
        program: The Pyro model.
        values: All its latent sites; those of ``sites`` with a gradient.
        sites: The sites to approximate; matrices of linear maps.
        data: A tokenised split.
        structure: ``"low_rank"`` and ``"dense"`` keep two Kronecker factors, ``"diagonal"`` the exact diagonal.
        rank: Of the large side under ``"low_rank"``.
        tokens: See `Reduction`.
        exact_up_to: The largest number of classes for which the Fisher information is exact.
        batch_size: Rows at once; the result does not depend on it but for round-off and truncation.

    Returns:
        Factors by site, and ``Σ_n log p(y_n | x_n, θ)`` in nats.

    Source: Martens & Grosse 2015; Eschenhagen et al. 2023 (reduce and expand); Yang et al. 2024, section 3.
    """
    recorder = Recorder(program, sites)
    found: dict[str, Factors] = {}
    for site in sites:
        if structure == "diagonal":
            found[site.name] = DiagonalFactors(site, device=program.device)
        else:
            found[site.name] = KroneckerFactors(site, structure, rank=rank, device=program.device)
    parameters = {name: value.detach() for name, value in values.items() if name not in program.sites}
    total = torch.zeros((), device=program.device)
    with evaluating(program.model), recorder.watching(), torch.enable_grad():
        for batch in batches(program, data, batch_size, label="curvature"):
            logits = recorder.run(values, batch)
            with torch.no_grad():
                total += program.likelihood.log_prob(logits.detach(), parameters, batch).sum()
            kind: Tokens = "whole" if structure == "diagonal" else tokens
            reduction = Reduction(kind, len(logits), batch.get("attention_mask"))
            for site in sites:
                found[site.name].add_inputs(recorder.inputs_of(site), reduction)
            vectors = list(
                program.likelihood.fisher_factors(logits.detach(), parameters, batch, exact_up_to=exact_up_to)
            )
            for i, vector in enumerate(vectors):
                rows = recorder.gradients(logits, vector, reduction.gradients, keep=i + 1 < len(vectors))
                for site in sites:
                    found[site.name].add_gradients(torch.stack([rows[path] for path, _ in site.holders]), reduction)
    return found, total
