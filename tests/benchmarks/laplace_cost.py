"""What Laplace costs beside plain LoRA: fit and prediction against classes and lengths, and peak memory.

Run: python tests/benchmarks/laplace_cost.py --rounds 3 --out cost.json
     python tests/benchmarks/laplace_cost.py --memory

An epoch is a forward and a backward pass of plain PEFT LoRA over the same rows, a prediction its forward pass alone;
all are interleaved, and timed by this process's CPU time on one thread (on a GPU by the wall clock). With a backward
pass for each class a fit cannot be faster than (1 + 2K)/3 epochs if a backward pass takes twice a forward pass, or
(1 + K)/2 if it takes as long; the exact Fisher information of K classes has rank K − 1 and needs one pass fewer.
Memory is the most that tensors alive at once take, as the allocator counts it.
What a fit checks on its first 16 rows, however many there are, is left out of its time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from step_time import BASE, LORA, clock, llama
from transformers import AutoTokenizer

from pyrolora.guides.curvature import batches, curvature
from pyrolora.guides.laplace import Laplace
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA, evaluating
from pyrolora.tasks.sequence_classification import SequenceClassification

CASES = [(2, 32), (2, 128), (2, 512), (4, 64), (20, 64)]
WORK = ["epoch", "forward", "fit", "fit, Monte Carlo", "predict"]


def bench(classes: int, length: int, rows: int, base: str) -> tuple[PyroLoRA, Laplace, PeftModel]:
    """A program over texts of one length, Laplace at weights away from zero, and plain PEFT LoRA."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    words = [word for word in tokenizer.get_vocab() if word.isalpha() and word.isascii()]
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=length - 2)) for _ in range(rows)]
    data = Dataset.from_list([{"text": text, "label": i % classes} for i, text in enumerate(texts)])
    # Fewer rows than classes leave some without an example, and classes they are all the same.
    names = [str(i) for i in range(classes)]
    task = SequenceClassification(tokenizer, train=data, test=data, max_length=length, class_names=names)
    load = lambda: task.load_base_model(BASE) if base == "minilm" else llama()  # noqa: E731
    torch.manual_seed(0)
    targets = LORA["target_modules"] if base == "minilm" else ["q_proj", "v_proj"]
    config = LoraConfig(**{**LORA, "target_modules": targets})
    priors = {"*.A": Normal("fan_in"), "*.B": Normal(0.1), "head.*": Normal(1.0)}
    program = PyroLoRA(load(), config, priors=priors, task=task)
    for name, parameter in program.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    program.latents = program._find_latents()
    guide = Laplace(optimise=False, batch_size=8)
    guide.bind(program)
    return program, guide, get_peft_model(load(), config)


def work(name: str, program: PyroLoRA, guide: Laplace, plain: PeftModel) -> None:
    assert program.task is not None and program.task.train is not None
    data = program.task.train
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    if name.startswith("fit"):
        # As post_fit does, less what it does once for a few rows of any data set: to see whether the noise drowns them.
        options = {"structure": guide.structure, "rank": guide.rank, "tokens": guide.tokens}
        exact_up_to = 0 if "Monte" in name else guide.exact_up_to
        given = {**options, "exact_up_to": exact_up_to, "batch_size": guide.batch_size}
        guide.set_curvature(*curvature(program, guide._values(), guide._groups(), data, **given))
        guide.tune(program, precision="marglik")
        return
    with evaluating(plain):
        for batch in batches(program, data, guide.batch_size, label=name):
            if name == "predict":
                guide.linearised(program, batch)
            elif name == "forward":
                with torch.no_grad():
                    plain(**{k: v for k, v in batch.items() if k != "labels"})
            else:
                torch.autograd.grad(plain(**batch).loss, trained)


def measure(case: tuple[int, int], rounds: int, rows: int) -> dict[str, Any]:
    parts = bench(*case, rows, "minilm")
    seconds: dict[str, list[float]] = {name: [] for name in WORK}
    for r in range(rounds + 1):
        for name in random.Random(r).sample(WORK[:2], 2) + random.Random(r).sample(WORK[2:4], 2) + WORK[4:]:
            start = clock()
            work(name, *parts)
            if r:  # the first round warms up
                seconds[name].append(clock() - start)
    of = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "classes": case[0],
        "length": case[1],
        "fit / epoch": of["fit"] / of["epoch"],
        "limit": (1 + 2 * case[0]) / 3,
        "Monte Carlo fit / epoch": of["fit, Monte Carlo"] / of["epoch"],
        "predict / forward": of["predict"] / of["forward"],
        "epoch / forward": of["epoch"] / of["forward"],
        "spread": {n: (max(v) - min(v)) / statistics.median(v) for n, v in seconds.items()},
    }


def peak_memory(name: str, parts: tuple[PyroLoRA, Laplace, PeftModel]) -> int:
    """The most bytes of tensors that were alive at once beside the weights of the two models."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work(name, *parts)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--memory", action="store_true", help="peak memory on a Llama of 135 M parameters, not time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        parts = bench(2, 128, 16, "llama")
        found: Any = {name: peak_memory(name, parts) for name in WORK}
        found["weights"] = sum(p.numel() * p.element_size() for p in parts[2].parameters())
        for name, value in found.items():
            ratio = (value + found["weights"]) / (found["epoch"] + found["weights"])
            print(f"{name:20s} {value / 2**20:7.0f} MiB; with the weights {ratio:.3f} of an epoch of plain LoRA")
    else:
        found = []
        for case in CASES:
            found.append(measure(case, options.rounds, options.rows))
            print(json.dumps(found[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
