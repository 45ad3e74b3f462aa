"""Draws side by side: each row of a batch sees its own draw, all in one pass of the base model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from pyrolora.adapters.noise import Change, require_linear
from pyrolora.adapters.sites import AdapterError, SiteGroup


def row_changes(
    model: nn.Module, sites: Mapping[str, SiteGroup], draws: Mapping[str, Tensor], examples: int
) -> list[tuple[str, Change]]:
    """What `changed_outputs` needs so that row ``s·b + n`` of a batch, example n of b, is run under draw s.

    A random map's output ``W x_r`` becomes ``W_s x_r`` for the rows of draw s: S small products as one batched one,
    while the base model's own weights are read once for all draws. Quantised bases and experts that are not adapted
    are served as any other.

    Args:
        model: The PEFT model.
        sites: Its site groups.
        draws: ``{site: (S, layers, *event_shape)}``; absent sites keep the model's own value.
        examples: b.

    Returns:
        Pairs of a module's path and a function of its input, ``(S·b, T, in)``, and output, ``(S·b, T, out)``.

    Raises:
        AdapterError: Embeddings, expert parameters, biases of heads; and, from the functions, an input that is not
            ``(S·b, T, in)``, as where tokens are routed: nobody can tell whose row is whose.
    """
    changes = []
    for name, value in draws.items():
        require_linear(model, sites[name], "a draw for each row", "run draw by draw")
        for layer, (path, key) in enumerate(sites[name].holders):
            if key != "weight":
                raise AdapterError(f"{path}: a draw for each row cannot serve its {key}; run draw by draw")
            weights = value[:, layer].to(model.get_parameter(f"{path}.{key}"))
            changes.append((path, _change(path, weights, examples)))
    return changes


def _change(path: str, weights: Tensor, examples: int) -> Change:
    size = len(weights)

    def change(x: Tensor, output: Tensor) -> Tensor:
        if x.dim() != 3 or len(x) != size * examples:
            raise AdapterError(f"{path} sees {tuple(x.shape)}, not all rows of {size} draws; run draw by draw")
        return (x.reshape(size, -1, x.shape[-1]) @ weights.mT).reshape(*x.shape[:-1], -1)

    return change
