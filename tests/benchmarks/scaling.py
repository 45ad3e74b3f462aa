"""How cost grows with layers, rank, draws, length and classes: fitted exponents beside what theory says, and the plot.

Run: python tests/benchmarks/scaling.py --rounds 5 --out scaling.json --plot scaling.png
     python tests/benchmarks/scaling.py --only rank draws --rounds 9

Every round times every size of every series once, in an order of its own, so that a busy machine slows all alike. On a
CPU the time is this process's CPU time on one thread, on a GPU the wall clock. A series' exponent is the slope of
log time over log size, least squares in each round; what is given is the median over rounds and its 95 % bootstrap
interval. A cost a + b·n has a slope below 1 at small n: theory bounds exponents from above.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from predict_time import batch as sentences
from predict_time import posterior
from pyro_overhead import program as llama_sites
from pyro_overhead import pyro_step
from step_time import BASE, LORA, clock, interval
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification

from pyrolora.guides.base import Guide
from pyrolora.guides.inducing import Inducing
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.elbo import Objective
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA

Work = Callable[[], Any]
Series = dict[str, Callable[[int], Work]]


@dataclass(frozen=True)
class Axis:
    """One quantity that is varied.

    Attributes:
        sizes: Its values.
        series: What is timed: name → work at a size.
        theory: Name → the largest exponent that theory allows, or the series whose exponent is the limit.
        says: Theory, in words.
    """

    sizes: tuple[int, ...]
    series: Series
    theory: dict[str, float | str]
    says: str


# -- what is timed -----------------------------------------------------------------------------------------------------


def sampling(make: Callable[[], Guide], *, width: int, layers: int | None = None) -> Callable[[int], Work]:
    """Sampling, placing, KL and their gradients over all linear modules of a Llama, whose layers or whose rank vary."""

    def at(size: int) -> Work:
        program = llama_sites(size, width) if layers is None else llama_sites(layers, width, rank=size)
        guide = make()
        guide.bind(program)
        return pyro_step(program, guide)

    return at


def prediction(*, last: bool) -> Callable[[int], Work]:
    inputs = sentences(8, 32)

    def at(draws: int) -> Work:
        run = posterior(inputs, draws, last=last)

        def predict() -> None:
            with torch.no_grad():
                run()

        return predict

    return at


def plain_step(length: int) -> Work:
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(BASE), LoraConfig(**LORA))
    inputs = {**sentences(8, length), "labels": torch.arange(8) % 2}

    def step() -> None:
        model(**inputs).loss.backward()
        model.zero_grad()

    return step


def training_step(make: Callable[[], Guide]) -> Callable[[int], Work]:
    def at(length: int) -> Work:
        program = PyroLoRA(
            AutoModelForSequenceClassification.from_pretrained(BASE),
            LoraConfig(**LORA),
            priors={"*.A": Normal("fan_in"), "*": Normal(0.1)},
            likelihood=Categorical(2),
            num_data=400,
        )
        guide = make()
        guide.bind(program)
        objective = Objective(program, guide)
        inputs = {**sentences(8, length), "labels": torch.arange(8) % 2}

        def step() -> None:
            objective(inputs).backward()
            objective.zero_grad()

        step()  # Pyro checks shapes once
        return step

    return at


def laplace(name: str) -> Callable[[int], Work]:
    from laplace_cost import bench, work

    def at(classes: int) -> Work:
        parts = bench(classes, 32, 8, "minilm")
        work("fit", *parts)
        return lambda: work(name, *parts)

    return at


def axes() -> dict[str, Axis]:
    return {
        "layers": Axis(
            (8, 16, 32, 64, 128),
            {
                "MAP": sampling(MAP, width=32),
                "MeanField": sampling(lambda: MeanField(random="*"), width=32),
                "Inducing": sampling(Inducing, width=32),
            },
            {"MAP": 1.0, "MeanField": 1.0, "Inducing": 1.0},
            "sites are stacked: Pyro's part does not depend on layers, arithmetic and placement grow as they do",
        ),
        "rank": Axis(
            (4, 8, 16, 32, 64),
            {
                "MeanField": sampling(lambda: MeanField(random="*"), width=512, layers=8),
                "Inducing": sampling(Inducing, width=512, layers=8),
                "Inducing, product": sampling(lambda: Inducing(structure="product"), width=512, layers=8),
            },
            {"MeanField": 1.0, "Inducing": 2.0, "Inducing, product": 2.0},
            "mean field draws r (d_in + d_out) numbers a module; V takes r² products for each of d_in columns",
        ),
        "draws": Axis(
            (1, 2, 4, 8, 16),
            {"all layers random": prediction(last=False), "last third random": prediction(last=True)},
            {"all layers random": 1.0, "last third random": 1.0},
            "S forwards; what comes before the first random layer is computed once",
        ),
        "length": Axis(
            (16, 32, 64, 128, 256),
            {
                "plain LoRA": plain_step,
                "MAP": training_step(MAP),
                "MeanField": training_step(MeanField),
                "Inducing": training_step(Inducing),
            },
            {"plain LoRA": 2.0, "MAP": "plain LoRA", "MeanField": "plain LoRA", "Inducing": "plain LoRA"},
            "noise of weights does not depend on the text: a step grows as plain LoRA's does",
        ),
        "classes": Axis(
            (2, 4, 8, 16, 32),
            {"Laplace, fit": laplace("fit"), "Laplace, prediction": laplace("predict")},
            {"Laplace, fit": 1.0, "Laplace, prediction": 1.0},
            "K − 1 backward passes of a fit and K of a prediction beside one forward",
        ),
    }


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(axis: Axis, rounds: int, *, label: str) -> dict[str, list[list[float]]]:
    """Seconds by series, size and round."""
    works = [(name, i, make(size)) for name, make in axis.series.items() for i, size in enumerate(axis.sizes)]
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in axis.sizes] for name in axis.series}
    for r in tqdm(range(rounds + 1), desc=label, leave=False):
        for name, i, work in random.Random(r).sample(works, len(works)):
            start = clock()
            work()
            if r:  # the first round warms up
                seconds[name][i].append(clock() - start)
    return seconds


def slope(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """Of log time over log size, least squares."""
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    return statistics.linear_regression(xs, ys).slope


def summary(axis: Axis, seconds: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Medians, exponents and their limits, by series."""
    found: dict[str, Any] = {}
    for name, by_size in seconds.items():
        found[name] = {
            "seconds": [statistics.median(values) for values in by_size],
            "exponent": interval([slope(axis.sizes, list(values)) for values in zip(*by_size, strict=True)], "value"),
        }
    for name, limit in axis.theory.items():
        found[name]["limit"] = found[limit]["exponent"]["value"] if isinstance(limit, str) else limit
    return {"sizes": axis.sizes, "theory": axis.says, "series": found}


def draw(results: dict[str, Any], path: Path) -> None:
    """Log–log panels, one for each axis; the grey line has the slope that theory allows at most."""
    figure = Figure(figsize=(3.2 * len(results), 3.4), layout="constrained")
    for panel, (name, found) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        sizes = found["sizes"]
        for series, row in found["series"].items():
            base = row["seconds"][0]
            label = f"{series}: {row['exponent']['value']:.2f}"
            panel.plot(sizes, [value / base for value in row["seconds"]], marker="o", markersize=3, label=label)
        most = max(row["limit"] for row in found["series"].values())
        panel.plot(sizes, [(size / sizes[0]) ** most for size in sizes], color="0.6", linestyle="--", linewidth=1)
        panel.set(xscale="log", yscale="log", xlabel=name, title=f"at most {most:.2g}")
        panel.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        panel.minorticks_off()
        panel.legend(fontsize=7, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("time, as a multiple of the smallest size's")
    figure.savefig(path, dpi=130)


def main() -> None:
    known = axes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in options.only:
        results[name] = summary(known[name], measure(known[name], options.rounds, label=name))
        for series, row in results[name]["series"].items():
            value = row["exponent"]
            shown = f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
            print(f"{name:8s} {series:22s} exponent {shown}, at most {row['limit']:.2f}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2))
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
