"""Variance of the gradient under each kind of noise in activation space, at one and the same posterior.

Run: python tests/benchmarks/gradient_variance.py --epochs 12 --batches 8 --draws 30 --out variance.json
BLoB is fitted to the embedded task as sweep.py does, under the prior and temperature of the table of all guides.
Then, without dropout, every batch has its gradient computed for many draws of each kind's noise; the variance is summed
over the entries of a parameter, and given as a ratio to that of one draw of the weights for the batch: median over
batches, with a 95 % bootstrap interval. "flipout, signs of inputs too" is that of Wen et al. 2018; pyrolora's has signs
of the outputs alone. G is the root of σ.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from guides_table import TEMPERATURES
from step_time import interval
from sweep import BLOB, Configuration, fitted, make_task
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrolora.adapters import noise
from pyrolora.adapters.noise import bottleneck_noise
from pyrolora.inference.elbo import Objective

PUBLISHED = "flipout, signs of inputs too"
KINDS = ["weight", "example", "flipout", PUBLISHED, "local"]
PARAMETERS = {"μ of A": "loc.lora", "G of A": "root_scale.lora", "B": "points.lora", "head": "points.head"}


def signs(*shape: int) -> Tensor:
    return 2.0 * torch.randint(2, shape) - 1


def made(kind: str, x: Tensor, scale: Tensor, **options: Any) -> Tensor:
    """`bottleneck_noise` of a kind, and Wen et al. 2018, eq. 4."""
    if kind != PUBLISHED:
        return bottleneck_noise(kind, x, scale, **options)  # type: ignore[arg-type]
    rows = (x * signs(*x.shape)) @ (scale * torch.randn_like(scale)).mT
    return rows * signs(*rows.shape)


def gradients(objective: Objective, batch: dict[str, Tensor], kind: str, draws: int) -> Iterator[dict[str, Tensor]]:
    """Of each draw, by parameter. The guide's noise is flipout, in whose place stands that of the kind."""
    named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    replaced = mock.patch.object(noise, "bottleneck_noise", lambda _, *args, **options: made(kind, *args, **options))
    with replaced, objective.guide.hooks(objective.program):
        for _ in range(draws):
            found = torch.autograd.grad(objective(dict(batch)), list(named.values()))
            by_name = dict(zip(named, found, strict=True))
            yield {
                title: torch.cat([grad.flatten() for name, grad in by_name.items() if f".{part}" in name])
                for title, part in PARAMETERS.items()
            }


def variances(objective: Objective, batch: dict[str, Tensor], kind: str, draws: int) -> dict[str, float]:
    """Summed over a parameter's entries; Welford's recursion, so that no draws are kept."""
    means: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for number, found in enumerate(gradients(objective, batch, kind, draws), 1):
        for title, grad in found.items():
            before = means.get(title, torch.zeros_like(grad))
            means[title] = before + (grad - before) / number
            squares[title] = squares.get(title, torch.zeros_like(grad)) + (grad - before) * (grad - means[title])
    return {title: float(square.sum()) / (draws - 1) for title, square in squares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = make_task("commonsense", None)
    chosen = Configuration("MeanField", BLOB, a=0.2, temperature=TEMPERATURES["BLoB"], epochs=options.epochs)
    posterior, _ = fitted(task, chosen, seed=0, keep=None, name="commonsense")
    objective = Objective(posterior.program, posterior.guide, chosen.temperature).train()
    for module in objective.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ratios: dict[str, dict[str, list[float]]] = {kind: {title: [] for title in PARAMETERS} for kind in KINDS}
    batches = [task.collate([task.train[16 * k + row] for row in range(16)]) for k in range(options.batches)]
    for batch in tqdm(batches, desc="batches"):
        found = {kind: variances(objective, batch, kind, options.draws) for kind in KINDS}
        for kind, row in ratios.items():
            for title, values in row.items():
                values.append(found[kind][title] / found["weight"][title])
    results = {kind: {title: interval(values) for title, values in row.items()} for kind, row in ratios.items()}
    for kind, row in results.items():
        cells = (f"{title} {one['ratio']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" for title, one in row.items())
        print(f"{kind:30s}", *cells, sep="  ")
    if options.out:
        options.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
