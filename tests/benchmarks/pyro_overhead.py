"""Pyro's own cost a step at the sites of Llama-2-7B (all linear modules, r = 8), without a base model.

Run: python tests/benchmarks/pyro_overhead.py --out pyro.json
Times one step of the program's and the guide's sampling, placement, KL and backward, and beside it, interleaved, the
same tensor operations written by hand; the difference is Pyro's overhead. Once with the sites, layers and modules of
7B but narrow matrices, where arithmetic costs nothing and the overhead is all that one sees, and once at full width,
where 20 million random numbers a step dominate on a CPU. Then, narrow again, with --depths layers: sites are stacked
over layers, so what grows is only that each layer's weights are put on its modules.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from step_time import interval
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pyrolora.guides.base import Guide
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.elbo import TemperedELBO
from pyrolora.likelihoods.next_token import NextToken
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def program(layers: int, width: int, *, rank: int = 8) -> PyroLoRA:
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=11008 * width // 4096,
        num_attention_heads=width // 16,
    )
    with init_empty_weights():
        model = LlamaForCausalLM(config)
        peft = get_peft_model(model, LoraConfig(r=rank, target_modules=ALL_LINEAR), low_cpu_mem_usage=True)
    for name, module in peft.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            module.to_empty(device="cpu")
            torch.nn.init.normal_(module.weight, std=0.01)
    priors = {"*.A": Normal("fan_in"), "*.B": Normal(0.1)}
    return PyroLoRA(peft, None, priors=priors, likelihood=NextToken(), num_data=1000)


def pyro_step(made: PyroLoRA, guide: Guide) -> Callable[[], None]:
    objective = TemperedELBO()  # with validation off, as after the first step of a fit

    def model() -> None:
        with made.placed(made.sample_latents()[0]):
            pass

    def step() -> None:
        with pyro.validation_enabled(False):
            objective.differentiable_loss(model, guide).backward()
        guide.zero_grad()

    return step


def by_hand(made: PyroLoRA, guide: MeanField) -> Callable[[], None]:
    scales = {name: made.priors[name].standard_deviation(site) for name, site in made.sites.items()}  # type: ignore[attr-defined]

    def step() -> None:
        loss: Tensor | float = 0.0
        for name in made.sites:
            key = name.replace(".", "/")
            if key in guide.loc:
                loc, scale = guide.loc[key], guide.log_scale[key].exp()
                draw = loc + scale * torch.randn_like(loc)
                ratio = (scale / scales[name]).square()
                loss = loss + 0.5 * (ratio + (loc / scales[name]).square() - 1 - ratio.log()).sum()
            else:
                draw = guide.points[key]
                loss = loss + 0.5 * (draw / scales[name]).square().sum()
            draw.unbind(0)
        assert isinstance(loss, Tensor)
        loss.backward()
        guide.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 4096])
    parser.add_argument("--depths", type=int, nargs="*", default=[8, 16, 32, 64, 128])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    narrow = min(options.widths)
    sizes = [(options.layers, width) for width in options.widths] + [(depth, narrow) for depth in options.depths]
    found = {
        f"{layers} layers, width {width}": report(program(layers, width), width, options.rounds)
        for layers, width in dict.fromkeys(sizes)
    }
    rows = [row for row in found.values() if row["width"] == narrow]
    if len(rows) > 1:
        logs = [[math.log(row[name]) for row in rows] for name in ("layers", "overhead")]
        print(f"overhead grows with layers to the power {statistics.linear_regression(*logs).slope:.2f}")
    if options.out:
        options.out.write_text(json.dumps(found, indent=2))


def report(made: PyroLoRA, width: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step and its overhead, after two rounds of warming up; their ratio, in the same round."""
    guide = MeanField(random="*")
    guide.bind(made)
    steps = {"pyro": pyro_step(made, guide), "by hand": by_hand(made, guide)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}
    difference = statistics.median([a - b for a, b in zip(times["pyro"][2:], times["by hand"][2:], strict=True)])
    numbers = sum(site.shape.numel() for site in made.sites.values())
    layers = next(iter(made.sites.values())).num_layers
    print(
        f"width {width}: {len(made.sites)} sites over {layers} layers, {numbers:,} random numbers: "
        f"{medians['pyro']:.1f} ms a step, {medians['by hand']:.1f} ms by hand, overhead {difference:.1f} ms"
    )
    ratios = [a / b for a, b in zip(times["pyro"][2:], times["by hand"][2:], strict=True)]
    about = {"sites": len(made.sites), "layers": layers, "width": width, "numbers": numbers}
    return {**about, **medians, "overhead": difference, **interval(ratios)}


if __name__ == "__main__":
    main()
