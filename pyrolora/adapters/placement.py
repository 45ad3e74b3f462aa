"""Placement: draws on PEFT's modules for the duration of a ``with`` block, and off again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from pyrolora.adapters.sites import SiteGroup

# Where a parameter stands: its module's table of parameters, and its name there.
Slot = tuple[dict[str, Tensor | None], str]


class Placement:
    """Where the values of each site stand in a model; puts draws there and takes them off.

    A draw is a plain tensor that stands in the module's parameter slot, so gradients flow to it, ``torch.vmap`` may
    batch it, and activation checkpointing sees an ordinary module. Nothing is copied into the parameter itself: after
    the block the very same parameter object is back.

    Args:
        model: The PEFT model.
        sites: Its site groups, from `find_sites`.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, SiteGroup]):
        self.sites = dict(sites)
        self._slots: dict[str, list[Slot]] = {
            name: [(model.get_submodule(path)._parameters, key) for path, key in site.holders]  # type: ignore[misc]
            for name, site in sites.items()
        }
        experts = (path for path, module in model.named_modules() if isinstance(module, ParamWrapper))
        self._experts = next(experts, None)

    @property
    def device(self) -> torch.device:
        """The device of the first site's first layer."""
        return _value(next(iter(self._slots.values()))[0]).device

    def current(self) -> dict[str, Tensor]:
        """The values that stand on the model now, stacked and detached: ``{site: (layers, *event_shape)}``."""
        return {name: torch.stack([_value(slot).detach() for slot in slots]) for name, slots in self._slots.items()}

    def placed(self, draws: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Places one draw for the duration of the block; the model is bitwise what it was afterwards.

        The context may be entered again: activation checkpointing does so at every backward pass.

        Args:
            draws: ``{site: (layers, *event_shape)}``; sites that are absent keep the model's own value.

        Raises:
            ValueError: An unknown site, or a value of another shape.
            RuntimeError: Expert parameters under ``torch.vmap``, which PEFT's parametrisation of them does not bear.
        """
        self._check(draws)
        return _Placed([self._slots[name] for name in draws], list(draws.values()))

    def _check(self, draws: Mapping[str, Tensor]) -> None:
        for name, value in draws.items():
            if name not in self.sites:
                raise ValueError(f"no site {name!r} on this model; its sites are {', '.join(self.sites)}")
            if value.shape != self.sites[name].shape:
                want = tuple(self.sites[name].shape)
                raise ValueError(f"site {name!r}: a draw has shape {want}, not {tuple(value.shape)}")
        if self._experts is not None and _inside_transform():
            # PEFT would fail half-way in its forward pass and leave the model parametrised.
            raise RuntimeError(f"{self._experts}: vmap cannot follow adapted expert parameters; run draw by draw")


class _Placed(AbstractContextManager[None]):
    """One draw on its slots."""

    def __init__(self, slots: Sequence[list[Slot]], draws: Sequence[Tensor]):
        self._slots = slots
        self._draws = draws
        self._restore: list[list[tuple[Slot, Tensor]]] = []

    def __enter__(self) -> None:
        pairs = [
            (slot, _value(slot), layer)
            for slots, draw in zip(self._slots, self._draws, strict=True)
            for slot, layer in zip(slots, draw.unbind(0), strict=True)
        ]
        values = [layer.to(device=own.device, dtype=own.dtype) for _, own, layer in pairs]
        self._restore.append([(slot, own) for slot, own, _ in pairs])
        for ((parameters, key), _, _), value in zip(pairs, values, strict=True):
            parameters[key] = value

    def __exit__(self, *exception: Any) -> None:
        for (parameters, key), own in self._restore.pop():
            parameters[key] = own


class Pass(AbstractContextManager[None]):
    """A pass of the base model under one draw: the adapters stand on it, and hooks can read all values.

    Args:
        running: A stack, on which the pass that runs now stands last.
        values: All of the draw.
        placed: From `Placement.placed`.
        notes: What hooks have noted of this pass, where it is recomputed.
    """

    def __init__(
        self,
        running: list[Pass],
        values: Mapping[str, Tensor],
        placed: AbstractContextManager,
        notes: dict[Any, Any] | None = None,
    ):
        self.values, self.notes = values, {} if notes is None else notes
        self._running, self._placed = running, placed

    def __enter__(self) -> None:
        self._placed.__enter__()
        self._running.append(self)

    def __exit__(self, *exception: Any) -> None:
        self._running.pop()
        self._placed.__exit__(*exception)


def _value(slot: Slot) -> Tensor:
    parameters, key = slot
    value = parameters[key]
    assert value is not None
    return value


def _inside_transform() -> bool:
    """Whether a functorch transform is running: there torch refuses this call, which PEFT makes too."""
    try:
        torch.empty(0).requires_grad_(False)
    except RuntimeError:
        return True
    return False
