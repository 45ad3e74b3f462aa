"""Noise in activation space: what random weights add to a module's output, without a weight matrix for each row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from pyrolora.adapters.sites import AdapterError, SiteGroup

Kind = Literal["weight", "example", "local", "flipout"]
# Of a module's input and output, the new output.
Change = Callable[[Tensor, Tensor], Tensor]
_Place = tuple[str, int]  # a site and a layer


def bottleneck_noise(
    kind: Kind,
    x: Tensor,
    scale: Tensor,
    *,
    examples: int,
    factor: Tensor | None = None,
    where: str = "a module",
) -> Tensor:
    """What ``W − W̄`` adds to ``W̄ x`` where ``W_ij ~ N(W̄_ij, f_n² σ_ij²)`` for example n.

    Every kind has variance ``d = f_n² (σ²)(x²)`` at each row; they differ in what is shared between rows:

    - ``"weight"``: one ``ε`` for the batch, ``f_n (σ ∘ ε) x``.
    - ``"example"``: one for each example, ``f_n (σ ∘ ε_n) x``: its tokens see one matrix.
    - ``"local"``: one for each row (token) and output, ``√d ∘ ε``; nothing of the size of W is drawn.
    - ``"flipout"``: one ``ε`` for the batch and a random sign for each row and output, ``f_n s ∘ (σ ∘ ε) x``: rows are
      uncorrelated, but not independent: noise of rows that point the same way has one size. As published, signs for
      a row's inputs too make such sizes differ; they cost a copy of the input in each pass, beside an ε of independent
      Normals they do not change the covariance, and on a real encoder they left the variance of gradients as it was.

    Computed in float32 whatever the type of x. It draws from torch's own generator, whose state activation
    checkpointing restores, so that a recomputation sees the same noise.

    Args:
        kind: Which.
        x: The module's input, ``(rows, ..., in)``; the rows of one example stand together.
        scale: σ, ``(out, in)``.
        examples: How many there are.
        factor: f, ``(examples,)``; None is 1.
        where: The module's name, for the message.

    Returns:
        ``(rows, ..., out)``.

    Raises:
        ValueError: Rows that cannot be divided among the examples.

    Source: Kingma et al. 2015, eq. 6 (local reparametrisation); Wen et al. 2018, eq. 4 (flipout; here
    with ones for the signs of the inputs).
    """
    if kind == "example" or factor is not None:
        _check_rows(len(x), examples, where)
    with full_precision(x.device):
        scale = scale.float()
        if kind == "local":
            square = x.detach().float().square().flatten(0, -2)
            epsilon = torch.randn(len(square), len(scale), device=x.device)
            noise, _ = _Local.apply(x.flatten(0, -2), square, scale, epsilon)
        elif kind == "example":
            each = torch.randn(examples, *scale.shape, dtype=scale.dtype, device=scale.device)
            noise = x.float().reshape(examples, -1, x.shape[-1]) @ (scale * each).mT
        else:
            noise = x.float() @ (scale * torch.randn_like(scale)).mT
            if kind == "flipout":
                noise = noise * (2 * torch.randint(2, noise.shape, dtype=noise.dtype, device=noise.device) - 1)
        noise = noise.reshape(*x.shape[:-1], len(scale))
        return noise if factor is None else _times(noise, factor)


class Stack:
    """`bottleneck_noise` for modules that read one tensor, as queries and values do, made in one pass over it.

    Of the lora_A modules that stand under one parent and have as many inputs, the first to run makes the noise of all,
    as if their matrices were one. Each of the others takes its part if it reads that very tensor; if not, it makes its
    own, and that of those that have not run. Whatever is shared, each module's noise has the law that it has alone, and
    that of two modules is uncorrelated.

    Modules whose input is a copy of what their layer reads (PEFT's dropout, or a cast to the adapter's type) stand
    alone. Under activation checkpointing modules of one parent have to lie in one checkpointed block, as those of a
    transformer's layer do: recomputing them makes and takes the same noise again.

    Args:
        model: The PEFT model.
        groups: The sites with noise.
        scale: Of a site's name and a layer's index, the σ of that module, ``(out, in)``.
        notes: Gives the notes of the pass that runs now; what is made for others does not outlive them.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Iterable[SiteGroup],
        scale: Callable[[str, int], Tensor],
        notes: Callable[[], dict[Any, Any]],
    ) -> None:
        self._scale, self._notes = scale, notes
        families: dict[tuple[str, int], list[_Place]] = {}
        for group in groups:
            for layer, (name, (path, _)) in enumerate(zip(group.layers, group.holders, strict=True)):
                if group.role == "A" and _reads_what_its_layer_reads(model, path):
                    families.setdefault((name.rpartition(".")[0], group.shape[-1]), []).append((group.name, layer))
        self._beside = {place: tuple(family) for family in families.values() for place in family}

    def noise(
        self,
        kind: Kind,
        x: Tensor,
        site: str,
        layer: int,
        *,
        examples: int,
        factor: Tensor | None = None,
        where: str = "a module",
    ) -> Tensor:
        """`bottleneck_noise` of one module, ``(rows, ..., out)``."""
        place = (site, layer)
        family, notes = self._beside.get(place, (place,)), self._notes()
        made, waiting = notes.get((self, family), ({}, family))
        if place not in waiting:  # it runs again
            made, waiting = {}, family
        waiting = [each for each in waiting if each != place]
        read, noise = made.pop(place, (None, x))
        if read is not x:
            scales = [self._scale(*each) for each in (place, *waiting)]
            noise = bottleneck_noise(kind, x, torch.cat(scales), examples=examples, where=where)
            noise, *others = noise.split([len(scale) for scale in scales], -1)
            made = {each: (x, other) for each, other in zip(waiting, others, strict=True)}
        notes[self, family] = made, waiting
        if factor is None:
            return noise
        _check_rows(len(x), examples, where)
        return _times(noise, factor)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A block without autocast."""
    # The meta device, on which memory is estimated, has none.
    off = device.type == "meta" or not torch.is_autocast_enabled(device.type)
    return contextlib.nullcontext() if off else torch.autocast(device.type, enabled=False)


@contextlib.contextmanager
def changed_outputs(model: nn.Module, changes: Iterable[tuple[str, Change]]) -> Iterator[None]:
    """Changes the outputs of modules for the duration of the block; afterwards the model has no hook of ours.

    Args:
        model: The PEFT model.
        changes: Pairs of a module's path and a function of its input and output.
    """
    with contextlib.ExitStack() as stack:
        for path, change in changes:
            stack.callback(model.get_submodule(path).register_forward_hook(_hook(change)).remove)
        yield


def require_linear(model: nn.Module, site: SiteGroup, what: str, advice: str) -> None:
    """Checks that the modules of a site are linear maps whose outputs a hook can change.

    Raises:
        AdapterError: Embeddings and expert parameters, which PEFT does not run as modules.
    """
    for path, _ in site.holders:
        if not isinstance(model.get_submodule(path), nn.Linear):
            raise AdapterError(f"{path} is not linear: {what} cannot serve {site.name!r}; {advice}")
        above = path.rpartition(".lora_")[0]
        if above and isinstance(model.get_submodule(above), ParamWrapper):
            raise AdapterError(f"{above}: expert parameters run no module: {what} cannot serve {site.name!r}; {advice}")


def _reads_what_its_layer_reads(model: nn.Module, path: str) -> bool:
    """Whether PEFT gives a lora_A the very tensor that the adapted module is given."""
    layer_path, _, adapter = path.rpartition(".lora_A.")
    layer: Any = model.get_submodule(layer_path)
    own, base = layer.lora_A[adapter].weight, getattr(layer.get_base_layer(), "weight", None)
    return isinstance(layer.lora_dropout[adapter], nn.Identity) and base is not None and own.dtype == base.dtype


def _times(noise: Tensor, factor: Tensor) -> Tensor:
    """Each example's noise times its factor; of noise that is a part of a stack's, without a copy of it first."""
    by_example = noise.unflatten(0, (len(factor), -1))
    return (by_example * factor.view(-1, *[1] * noise.dim())).flatten(0, 1)


def _check_rows(rows: int, examples: int, where: str) -> None:
    if rows % examples:
        raise ValueError(
            f"{where} sees {rows} rows for {examples} examples, so nobody can tell whose row is whose; "
            'use noise="weight"'
        )


def _hook(change: Change) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return change(inputs[0], output)

    return hook


class _Local(torch.autograd.Function):
    """``√((x²)(σ²)) ∘ ε`` of x and x². What autograd would record takes twice the time."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, square: Tensor, scale: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        # At zero the root's derivative is infinite, and infinity times zero is NaN.
        deviation = (square @ scale.square().mT).clamp(min=1e-30).sqrt()
        return deviation * noise, deviation

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, square, scale, noise, deviation = ctx.saved_tensors
        # Of √d: 1/(2√d); of d: 2 σ² x and 2 σ x².
        ratio = grad * noise / deviation
        by_x = (ratio @ scale.square()).mul_(x).to(x.dtype) if ctx.needs_input_grad[0] else None
        by_scale = (ratio.mT @ square).mul_(scale) if ctx.needs_input_grad[2] else None
        return by_x, None, by_scale, None
