"""Ranks that the data do not need are taken back, where the true rank is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import torch
from peft import LoraConfig
from torch import Tensor, nn

from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.inference.randomness import isolated
from pyrolora.likelihoods.normal import Normal as NormalLikelihood
from pyrolora.priors.base import Prior
from pyrolora.priors.hierarchical import ARD
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA

INPUTS, OUTPUTS, ROWS, NOISE = 12, 10, 200, 0.5


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(INPUTS, OUTPUTS, bias=False)
        nn.init.zeros_(self.map.weight)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.map(x))


class Pairs:
    """Noisy outputs of a map of rank one."""

    def __init__(self) -> None:
        with isolated(0):
            direction = torch.outer(torch.randn(OUTPUTS), torch.randn(INPUTS))
            x = torch.randn(ROWS, INPUTS)
            y = x @ (2 * direction / direction.norm()).T + NOISE * torch.randn(ROWS, OUTPUTS)
        self.train = datasets.Dataset.from_dict({"x": x.tolist(), "labels": y.tolist()})
        self.likelihood = NormalLikelihood(scale=NOISE)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in ("x", "labels")}


def fitted(of_b: Prior) -> dict[str, Tensor]:
    """The mean of a fit with four ranks, at β = 1."""
    with isolated(0):
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["map"])
        program = PyroLoRA(Linear(), config, priors={"*.A": Normal(0.2), "*.B": of_b}, task=Pairs())  # type: ignore[arg-type]
    arguments = default_arguments(seed=0)
    arguments.per_device_train_batch_size, arguments.max_steps, arguments.learning_rate = 100, 600, 0.02
    return fit(program, MeanField(random="*"), args=arguments).mean()


def test_ard_takes_back_ranks_that_the_data_do_not_need() -> None:
    """Law: of four ranks for a map of rank one, ARD leaves two in one direction at most; a fixed scale leaves three."""
    contributions, scale = {}, torch.zeros(0)
    for name, prior in (("ARD", ARD(0.05)), ("Normal", Normal(0.05))):
        mean = fitted(prior)
        size = mean["lora.map.A"][0].norm(dim=-1) * mean["lora.map.B"][0].norm(dim=0)
        order = size.argsort(descending=True)
        contributions[name] = size[order] / size.max()
        if name == "ARD":
            scale = mean["lora.map.B.scale"][0][order]
    assert contributions["ARD"][2] < 0.03 < 0.2 < contributions["Normal"][2]
    # The scales say which: those of the ranks taken back have fallen below the prior's median, the others risen.
    assert bool(scale[0] > 0.2 and (scale[2:] < 0.05).all())
