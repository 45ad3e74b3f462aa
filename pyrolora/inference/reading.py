"""Draws of a language model's weights reading texts as they grow: one KV cache, one pass a token."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyrolora.adapters.noise import changed_outputs
from pyrolora.adapters.rows import row_changes
from pyrolora.program import PyroLoRA


class Reader:
    """S draws reading b texts each: a batch of S·b rows, whose adapters differ and whose base weights are read once.

    Args:
        program: Over a causal language model with a KV cache.
        draws: ``{site: (S, *shape)}``. A single draw is placed on the model, which every architecture bears.
        examples: b.

    Raises:
        AdapterError: Several draws that cannot stand side by side: see `row_changes`. A call raises it too.
    """

    def __init__(self, program: PyroLoRA, draws: Mapping[str, Tensor], examples: int):
        self.size = len(next(iter(draws.values())))
        if self.size == 1:
            draw = {name: value[0] for name, value in draws.items()}
            self._placed = lambda: program.placed(draw)
        else:
            changes = row_changes(program.model, program.sites, draws, examples)
            self._placed = lambda: changed_outputs(program.model, changes)
        self._model = program.model
        known = inspect.signature(program.model.get_base_model().forward).parameters
        self._last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._positions = "position_ids" in known
        self._cache: Any = None

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """``log p(· | text so far, θ_s)``, ``(S, b, V)``.

        Args:
            tokens: Those that are new, ``(S, b, t)``, or ``(1, b, t)`` where all draws read the same.
            mask: Of all tokens so far, padded on the left, ``(b, T)``.
        """
        rows = tokens.expand(self.size, -1, -1).flatten(0, 1)
        mask = mask.repeat(self.size, 1)
        inputs = {"input_ids": rows, "attention_mask": mask, **self._last}
        if self._positions:
            # Counted from each text's first real token, as in training.
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -rows.shape[1] :]
        with self._placed():
            output = self._model(**inputs, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        return output.logits[:, -1].float().log_softmax(-1).unflatten(0, (self.size, -1))
