"""MC dropout: LoRA's own dropout, kept on when predicting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyrolora.guides.base import Card
from pyrolora.guides.map import MAP
from pyrolora.program import Batch, PyroLoRA


class Dropout(MAP):
    """``p(y|x) ≈ (1/S) Σ_s softmax f(x; θ*, m_s)``: MAP under LoRA's dropout, averaged over masks at test.

    ``h = A (m ∘ x) / (1 − p)``, ``m ~ Bernoulli(1 − p)`` for each input of each adapter and each token, as in training;
    p is ``LoraConfig(lora_dropout=...)``, usually 0.1, and S usually 10. A draw is a set of masks, not one value of the
    weights: draws of weights, exported adapters and predictions with ``num_draws=0`` are those of the point, without
    dropout, and differ from the average. The base model's own dropout stays off.

    Raises:
        ValueError: LoRA was configured without dropout.

    Source: Gal & Ghahramani 2016; on LoRA as a baseline, Wang et al. 2024 (BLoB), section 5.
    """

    card = Card("LoRA's dropout masks", "1 a step", "S")

    def bind(self, program: PyroLoRA) -> None:
        if not _masks(program):
            raise ValueError(
                "Dropout predicts through LoRA's dropout, and this adapter has none (lora_dropout=0): configure "
                "LoraConfig(lora_dropout=0.1), in a recipe `adapter: {lora_dropout: 0.1}`, and fit again"
            )
        super().bind(program)

    def passes(self, num_draws: int, num_outputs: int) -> int:
        return max(num_draws, 1)

    @property
    def joint_draws(self) -> bool:
        return False

    def natural_parameters(
        self, program: PyroLoRA, num_draws: int, *, seed: int = 0
    ) -> Callable[[Batch], Tensor] | None:
        """Under S sets of masks; those of a batch depend on the seed, on s and on the batches before it."""
        values = self.mean()
        seeds = [torch.Generator().manual_seed((seed * 1_000_003 + s) % 2**63) for s in range(num_draws)]

        def draws(batch: Batch) -> Tensor:
            rows = []
            with torch.random.fork_rng(), _dropping(program):
                for own in seeds:
                    torch.manual_seed(int(torch.randint(2**62, (), generator=own)))
                    rows.append(program.logits(values, batch))
            return torch.stack(rows)

        return draws


@contextlib.contextmanager
def _dropping(program: PyroLoRA) -> Iterator[None]:
    """LoRA's dropout on, for the duration of the block."""
    masks = _masks(program)
    modes = [mask.training for mask in masks]
    try:
        for mask in masks:
            mask.train()
        yield
    finally:
        for mask, mode in zip(masks, modes, strict=True):
            mask.train(mode)


def _masks(program: PyroLoRA) -> list[nn.Dropout]:
    found = []
    for module in program.model.modules():
        own: Any = getattr(module, "lora_dropout", None)
        if isinstance(own, nn.ModuleDict) and program.adapter_name in own:
            found.append(own[program.adapter_name])
    return [mask for mask in found if isinstance(mask, nn.Dropout) and mask.p > 0]
