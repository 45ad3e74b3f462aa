"""Step, memory and prediction at the shapes of 7B to 30B models with random bf16 weights, against plain PEFT LoRA.

Run: python tests/benchmarks/large.py --shapes llama-7b llama-13b qwen3-30b-a3b --device cuda --out large.json
     python tests/benchmarks/large.py --shapes tiny tiny-moe --rounds 2

r = 8 on q, v and lm_head, four answer tokens, batches of 4 prompts of 300 tokens. All methods share one base model with
one PEFT adapter and take turns within a round, so that ratios are of the same minute; plain LoRA computes the logits
of the answers alone, as all others do. A step is forward, backward and AdamW. Memory is the allocator's peak during a
method's steps, base included; a CPU has none to report. Laplace's fit is in plain forward and backward passes over the
same rows, its memory that of a step of plain LoRA. Predictions are in plain forward passes of the same batch.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from laplace_cost import work
from peft import LoraConfig, PeftModel, get_peft_model
from step_time import GUIDES, interval
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from pyrolora.guides.base import Guide
from pyrolora.guides.laplace import Laplace
from pyrolora.inference.elbo import Objective
from pyrolora.inference.posterior import Posterior
from pyrolora.likelihoods.answer_tokens import AnswerTokens
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA, evaluating

PLAIN = "plain LoRA"
STEPS = ["MAP", "MeanField", "Inducing", "Inducing, product", "BLoB", "InputAdaptive"]


def shapes() -> dict[str, Callable[[], PretrainedConfig]]:
    expert = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "num_key_value_heads": 4}
    small = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    few = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 2}
    return {
        "llama-7b": LlamaConfig,  # its defaults are that model
        "llama-13b": lambda: LlamaConfig(
            hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
        ),
        "qwen3-30b-a3b": lambda: Qwen3MoeConfig(
            vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, head_dim=128, **expert
        ),
        "tiny": lambda: LlamaConfig(**small, num_attention_heads=4),
        "tiny-moe": lambda: Qwen3MoeConfig(**small, num_attention_heads=4, **few),
    }


class Prompts:
    """Random prompts with an answer each."""

    validation, test, ood, tokenizer, class_names = None, None, {}, None, ("a", "b", "c", "d")

    def __init__(self, vocabulary: int, rows: int, length: int):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
        self.train = Dataset.from_dict({"input_ids": ids.tolist(), "labels": [i % 4 for i in range(rows)]})
        self.likelihood = AnswerTokens([5, 6, 7, 8])

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }


class Bench:
    """One base model and adapter under all methods."""

    def __init__(self, shape: str, device: str, batch_size: int, length: int):
        config = shapes()[shape]()
        torch.manual_seed(0)
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "lm_head"], task_type="CAUSAL_LM")
        self.peft: PeftModel = get_peft_model(base, lora)
        self.device = device
        self.task: Any = Prompts(config.vocab_size, 4 * batch_size, length)
        priors = {"*.A": Normal("fan_in"), "*.B": Normal(0.1)}
        self.program = PyroLoRA(self.peft, None, priors=priors, task=self.task)
        rows = [self.task.train[i] for i in range(batch_size)]
        self.batch = {name: value.to(device) for name, value in self.task.collate(rows).items()}
        self.adapters = [p for name, p in self.peft.named_parameters() if "lora_" in name]
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        self.objectives: dict[str, Objective] = {}

    def clock(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def plain_loss(self) -> Tensor:
        logits = self.task.likelihood.evaluate(self.peft, self.batch)
        return torch.nn.functional.cross_entropy(logits, self.batch["labels"])

    def plain_step(self) -> None:
        self.plain_loss().backward()
        self.optimisers[PLAIN].step()
        self.optimisers[PLAIN].zero_grad()

    def guide(self, name: str) -> Guide:
        guide = GUIDES[name]()
        guide.bind(self.program)
        return guide.to(self.device)

    def steps(self, method: str, count: int) -> tuple[float, int]:
        """Median seconds of a step, and the peak of memory."""
        plain = method == PLAIN
        for parameter in self.adapters:
            parameter.requires_grad_(plain)
        if method not in self.optimisers:
            if not plain:
                self.objectives[method] = Objective(self.program, self.guide(method))
            trained = self.adapters if plain else self.objectives[method].guide.parameters()
            self.optimisers[method] = torch.optim.AdamW(trained, lr=1e-4)
        self.peft.train()
        self.forget_peak()
        times = []
        for _ in range(count + 1):
            start = self.clock()
            self.plain_step() if plain else self.own_step(method)
            times.append(self.clock() - start)
        return statistics.median(times[1:]), self.peak()

    def forget_peak(self) -> None:
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Bytes, since they were last forgotten; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device != "cpu" else 0

    def own_step(self, method: str) -> None:
        objective, optimiser = self.objectives[method], self.optimisers[method]
        with objective.guide.hooks(self.program):
            objective(self.batch).backward()
        optimiser.step()
        optimiser.zero_grad()

    def timed(self, run: Callable[[], Any]) -> float:
        start = self.clock()
        run()
        return self.clock() - start

    def plain_epoch(self) -> None:
        for parameter in self.adapters:
            parameter.requires_grad_(True)
        for _ in range(4):
            torch.autograd.grad(self.plain_loss(), self.adapters)

    def plain_forward(self) -> None:
        with torch.no_grad(), evaluating(self.peft):
            self.task.likelihood.evaluate(self.peft, self.batch)


def training(bench: Bench, rounds: int, steps: int) -> dict[str, Any]:
    """Ratios of each method's step to plain LoRA's in the same round, and of memory."""
    methods = [PLAIN, *STEPS]
    ratios: dict[str, list[float]] = {method: [] for method in methods}
    peaks: dict[str, int] = {}
    seconds = []
    for r in tqdm(range(rounds), desc="rounds"):
        found = {method: bench.steps(method, steps) for method in random.Random(r).sample(methods, len(methods))}
        seconds.append(found[PLAIN][0])
        for method, (time_, peak) in found.items():
            ratios[method].append(time_ / found[PLAIN][0])
            peaks[method] = max(peak, peaks.get(method, 0))
    rows = {method: interval(values) for method, values in ratios.items()}
    for method, row in rows.items() if peaks[PLAIN] else ():
        row["memory"] = peaks[method] / peaks[PLAIN]
    return {"seconds": statistics.median(seconds), "gibibytes": peaks[PLAIN] / 2**30, "step": rows}


def predicting(bench: Bench, rounds: int, draws: list[int], plain_peak: float) -> dict[str, Any]:
    """S draws of mean field, and a linearised Laplace prediction, in plain forward passes; Laplace's fit in epochs.

    Memory is the peak of each, in that of plain LoRA's training.
    """
    guide = bench.guide("MeanField")
    runners = {f"{s} draws": Posterior(bench.program, guide).runner(s, chunk_size=8) for s in draws}
    laplace = Laplace(optimise=False, precision=1.0, batch_size=len(bench.batch["labels"]))
    laplace.bind(bench.program)
    works: dict[str, Callable[[], Any]] = {
        name: lambda runner=runner: runner.evaluate(bench.program.logits, bench.batch)
        for name, runner in runners.items()
    }
    ratios: dict[str, list[float]] = {name: [] for name in (*works, "Laplace, fit", "Laplace, prediction")}
    peaks: dict[str, int] = {}

    def timed(name: str, run: Callable[[], Any]) -> float:
        bench.forget_peak()
        seconds = bench.timed(run)
        peaks[name] = bench.peak()
        return seconds

    for r in range(rounds + 1):
        forward = bench.timed(bench.plain_forward)
        found = {name: timed(name, run) / forward for name, run in works.items()}
        epoch = bench.timed(bench.plain_epoch)
        fit, linearised = "Laplace, fit", "Laplace, prediction"
        with evaluating(bench.program.model):
            found[fit] = timed(fit, lambda: work("fit", bench.program, laplace, bench.peft)) / epoch
            found[linearised] = timed(linearised, lambda: laplace.linearised(bench.program, bench.batch)) / forward
        for name, value in found.items() if r else ():
            ratios[name].append(value)
    memory = {name: {"memory": peak / plain_peak} for name, peak in peaks.items() if peak}
    return {name: {**interval(values), **memory.get(name, {})} for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(shapes()), default=["tiny"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=300)
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if options.device != "cpu" else "CPU, one thread"
    results: dict[str, Any] = {"device": name}
    for shape in options.shapes:
        bench = Bench(shape, options.device, options.batch, options.length)
        found = training(bench, options.rounds, options.steps)
        found["predict"] = predicting(bench, options.rounds, options.draws, found["gibibytes"] * 2**30)
        results[shape] = found
        print(f"{shape} on {name}: {found['seconds']:.3f} s a step of plain LoRA, {found['gibibytes']:.1f} GiB")
        for method, row in {**found["step"], **found["predict"]}.items():
            memory = f"  memory {row['memory']:.3f}" if "memory" in row else ""
            print(f"  {method:22s} {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]{memory}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=2))
        del bench
        if options.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
