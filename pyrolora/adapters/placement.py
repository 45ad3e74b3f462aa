"""Placement: draws on PEFT's modules for the duration of a ``with`` block, and off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyrolora.adapters.sites import SiteGroup


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
        self._slots: dict[str, list[tuple[dict[str, Tensor | None], str]]] = {
            name: [(model.get_submodule(path)._parameters, key) for path, key in site.holders]  # type: ignore[misc]
            for name, site in sites.items()
        }

    def current(self) -> dict[str, Tensor]:
        """The values that stand on the model now, stacked and detached: ``{site: (layers, *event_shape)}``."""
        return {
            name: torch.stack([self._value(slot, key).detach() for slot, key in slots])
            for name, slots in self._slots.items()
        }

    @contextmanager
    def placed(self, draws: Mapping[str, Tensor]) -> Iterator[None]:
        """Places one draw for the duration of the block; the model is bitwise what it was afterwards.

        Args:
            draws: ``{site: (layers, *event_shape)}``; sites that are absent keep the model's own value.

        Raises:
            ValueError: An unknown site, or a value of another shape.
        """
        self._check(draws)
        restore: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
        try:
            for name, value in draws.items():
                for (slot, key), layer in zip(self._slots[name], value.unbind(0), strict=True):
                    own = self._value(slot, key)
                    restore.append((slot, key, own))
                    slot[key] = layer.to(device=own.device, dtype=own.dtype)
            yield
        finally:
            for slot, key, own in reversed(restore):
                slot[key] = own

    @staticmethod
    def _value(slot: dict[str, Tensor | None], key: str) -> Tensor:
        value = slot[key]
        assert value is not None
        return value

    def _check(self, draws: Mapping[str, Tensor]) -> None:
        for name, value in draws.items():
            if name not in self.sites:
                raise ValueError(f"no site {name!r} on this model; its sites are {', '.join(self.sites)}")
            if value.shape != self.sites[name].shape:
                want = tuple(self.sites[name].shape)
                raise ValueError(f"site {name!r}: a draw has shape {want}, not {tuple(value.shape)}")
