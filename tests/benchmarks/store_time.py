"""Saving, loading and importing, beside PEFT's own: ratios taken within rounds.

Run: python tests/benchmarks/store_time.py --rounds 7 --out store_time.json

save, load: a posterior over MiniLM's adapters against `save_pretrained` and `PeftModel.from_pretrained` of the same
    adapter; the base model is in memory already. A load checks checksums and that the base weights are the fit's.
import: processor time of a fresh interpreter that imports pyrolora, against one that imports the libraries under it.
The time is this process's CPU time on one thread; files are in the system's temporary folder.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from step_time import BASE, GUIDES, LORA, clock, interval
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pyrolora.inference.posterior import Posterior
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from pyrolora.tasks.sequence_classification import SequenceClassification

Work = Callable[[], Any]
SAVED = ["MAP", "MeanField", "Inducing", "InputAdaptive"]
IMPORTS = {
    "torch": "import torch",
    "torch, transformers, peft, pyro": "import torch, transformers, peft, pyro",
    "pyrolora": "import pyrolora",
    "pyrolora --help": "import sys; sys.argv = ['pyrolora', '--help']; from pyrolora.cli import main; main()",
}


def base() -> Any:
    return AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=2)


def posterior_of(name: str) -> Posterior:
    rows = Dataset.from_dict({"text": ["a", "b"], "label": ["no", "yes"]})
    task = SequenceClassification(AutoTokenizer.from_pretrained(BASE), train=rows, test=rows)
    priors = {"*.A": Normal("fan_in"), "*.B": Normal(0.1), "head.*": Normal(1.0)}
    program = PyroLoRA(base(), LoraConfig(**LORA), priors=priors, task=task)
    guide = GUIDES[name]()
    guide.bind(program)
    return Posterior(program, guide)


def works(folder: Path) -> dict[str, tuple[Work, Work]]:
    """Name → (save, load), on a base model without adapters for each load."""
    adapter = get_peft_model(base(), LoraConfig(**LORA))
    found: dict[str, tuple[Work, Work]] = {
        "PEFT": (
            lambda: adapter.save_pretrained(folder / "peft"),
            lambda model: PeftModel.from_pretrained(model, folder / "peft"),
        )
    }
    for name in SAVED:
        posterior, place = posterior_of(name), folder / name
        found[name] = (
            lambda posterior=posterior, place=place: posterior.save_pretrained(place),
            lambda model, place=place: Posterior.from_pretrained(place, model),
        )
    return found


def stored(rounds: int) -> dict[str, Any]:
    """Time of saving and of loading as a ratio to PEFT's, and the size on disk."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made = works(folder)
        ratios: dict[str, dict[str, list[float]]] = {name: {"save": [], "load": []} for name in SAVED}
        for r in tqdm(range(rounds + 1), desc="save and load"):
            seconds: dict[str, tuple[float, float]] = {}
            for name, (save, load) in made.items():
                model = base()
                start = clock()
                save()
                between = clock()
                load(model)
                seconds[name] = (between - start, clock() - between)
            for name in SAVED if r else ():
                for i, kind in enumerate(("save", "load")):
                    ratios[name][kind].append(seconds[name][i] / seconds["PEFT"][i])
        sizes = {name: sum(file.stat().st_size for file in (folder / name).iterdir()) for name in SAVED}
        peft = sum(file.stat().st_size for file in (folder / "peft").iterdir())
    return {
        name: {kind: interval(values) for kind, values in kinds.items()} | {"size": sizes[name] / peft}
        for name, kinds in ratios.items()
    }


def imported(rounds: int) -> dict[str, Any]:
    """Processor seconds of fresh interpreters, and ratios to the libraries' alone."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for r in tqdm(range(rounds + 1), desc="import"):
        for name, line in IMPORTS.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-W", "ignore", "-c", line], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if r:
                seconds[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    libraries = seconds["torch, transformers, peft, pyro"]
    return {
        name: {
            "seconds": statistics.median(values),
            **interval([own / other for own, other in zip(values, libraries, strict=True)]),
        }
        for name, values in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {"store": stored(options.rounds), "import": imported(options.rounds)}
    for name, row in results["store"].items():
        kinds = (
            f"{kind} {row[kind]['ratio']:.2f} [{row[kind]['low']:.2f}, {row[kind]['high']:.2f}]"
            for kind in row
            if kind != "size"
        )
        print(f"{name:16s} {', '.join(kinds)}, bytes {row['size']:.2f}")
    for name, row in results["import"].items():
        print(f"{name:32s} {row['seconds']:.1f} s, {row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]")
    if options.out:
        options.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
