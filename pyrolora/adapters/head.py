"""The output layer of a language model, run at one position and for a few tokens only, for a ``with`` block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

# From the model's logits to those of the chosen tokens, ``(b, K)``.
Selection = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def narrowed_head(model: nn.Module, positions: Tensor, tokens: Sequence[int]) -> Iterator[Selection]:
    """Runs the output layer where its logits are read, and nowhere else; afterwards the model is bitwise what it was.

    Of ``f_ntv = w_v · h_nt + b_v``, shape (b, T, V), only ``v`` among the K tokens at ``t = t_n`` is computed. Where
    the output layer is no plain linear map (adapted by PEFT, quantised, elsewhere than its input), only the positions
    are fewer: (b, 1, V). A model without an output layer of its own runs whole. Gradients, ``torch.vmap`` and
    activation checkpointing go through, as with any other input and weight of that layer.

    Args:
        model: A Hugging Face model, with PEFT's adapters or without.
        positions: ``t_n``, ``(b,)``.
        tokens: The K tokens.

    Yields:
        What takes the block's output logits, which are then (b, 1, K), (b, 1, V) or (b, T, V), to ``(b, K)``.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.get_output_embeddings()
    chosen = torch.tensor(tokens, device=positions.device)
    if head is None:
        yield lambda logits: _at(logits, positions)[:, chosen.to(logits.device)]
        return
    narrowing = _Narrowing(positions, chosen)
    before = head.register_forward_pre_hook(narrowing.before)
    after = head.register_forward_hook(narrowing.after, always_call=True)
    try:
        yield narrowing.selected
    finally:
        before.remove()
        after.remove()


class _Narrowing:
    """What happens just before and just after the output layer runs: by then offloaded or sharded weights are there."""

    def __init__(self, positions: Tensor, tokens: Tensor):
        self._positions, self._tokens = positions, tokens
        self._own: dict[str, Tensor | None] = {}
        self._rows = False

    def before(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        self._rows = _is_plain(head, hidden)
        if self._rows:
            self._own = dict(head._parameters)
            chosen = self._tokens.to(hidden.device)
            for name, value in self._own.items():
                head._parameters[name] = None if value is None else value[chosen]  # type: ignore[assignment]
        return (_at(hidden, self._positions).unsqueeze(1), *inputs[1:])

    def after(self, head: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        head._parameters.update(self._own)  # type: ignore[arg-type]
        self._own = {}

    def selected(self, logits: Tensor) -> Tensor:
        return logits[:, 0] if self._rows else logits[:, 0, self._tokens.to(logits.device)]


def _is_plain(head: nn.Module, hidden: Tensor) -> bool:
    """Whether the rows of the weight are those of the output: a linear map, its whole weight beside its input."""
    weight = head._parameters.get("weight")
    return (
        type(head) is nn.Linear
        and weight is not None
        and type(weight) in (nn.Parameter, Tensor)
        and weight.shape == (head.out_features, head.in_features)
        and weight.device == hidden.device
    )


def _at(values: Tensor, positions: Tensor) -> Tensor:
    """``(b, T, n)`` at each row's position: ``(b, n)``."""
    rows = torch.arange(len(positions), device=values.device)
    return values[rows, positions.to(values.device)]
