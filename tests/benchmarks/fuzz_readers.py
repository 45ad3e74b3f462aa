"""Mutates saved posteriors, checkpoints, adapters, recipes and data at random: they are loaded, or refused by us.

What was damaged without its checksums being renewed must be refused, or be read to the bit as it was written. Files
with renewed checksums are those of somebody who knows the format. Run: ``python tests/benchmarks/fuzz_readers.py``.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import datasets
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from pyrolora.adapters.checkpoint import load_adapter
from pyrolora.adapters.sites import AdapterError
from pyrolora.construct import RecipeError
from pyrolora.guides.inducing import Inducing
from pyrolora.guides.input_adaptive import InputAdaptive
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.guides.subspace import Subspace
from pyrolora.inference.archive import ArchiveError, digest, sealed, write_json
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.recipe import Recipe
from pyrolora.tasks.data import DataError
from pyrolora.tasks.sequence_classification import SequenceClassification
from tests.programs import MINILM, lora, sentence_task, sentences, tiny_bert, tiny_program, tokenizer, untrained

OURS = (ArchiveError, AdapterError, RecipeError, DataError)
SECONDS = 60  # for one file, on a busy machine; a reader that takes longer hangs
HOSTILE: list[Any] = [
    *(None, True, -1, 0, 2**70, 1e308, -0.0, "", "x" * 5000, "../../etc/passwd", "\0", [], {}, [[]]),
    *(float("nan"), float("inf"), "os.system", "guides.NUTS", {"class": "os.system", "init": {"command": "true"}}),
    *({"class": "guides.MAP", "init": {}}, {"class": "priors.Normal", "init": {"scale": 0}}, {"custom": "f"}),
    *({"class": "guides.Guide", "init": {}}, {"class_path": "builtins.eval"}, "IA3", "megatron.core", 10**6, [1, "a"]),
]
RECIPE = """
base: {base}
adapter: {{r: 2, lora_alpha: 4, target_modules: [query, value], task_type: SEQ_CLS}}
priors:
  "*.A": {{class_path: Normal, init_args: {{scale: fan_in}}}}
  "*": {{class_path: Normal, init_args: {{scale: 1}}}}
task: {{class_path: SequenceClassification, init_args: {{train: data.jsonl, max_length: 16}}}}
training: {{learning_rate: 2.0e-3}}
guides: {{MeanField: {{init_scale: 0.1}}}}
"""


def prepare(root: Path) -> list[Path]:
    """One folder of each kind, whole."""
    folders = []
    for guide in (MAP(), MeanField(), Inducing(), InputAdaptive(), Subspace()):
        folders.append(untrained(guide).save_pretrained(root / f"posterior-{type(guide).__name__}"))
    fit(tiny_program(), MeanField(), args=arguments(root / "run"))
    folders.append((root / "run" / "checkpoint-1").rename(root / "checkpoint"))
    get_peft_model(tiny_bert(), lora()).save_pretrained(str(root / "adapter"))
    for name in ("recipe", "data"):
        (root / name).mkdir()
    (root / "recipe" / "recipe.yaml").write_text(RECIPE.format(base=MINILM))
    rows = sentences(12)
    rows.to_json(str(root / "data" / "data.jsonl"))
    rows.to_csv(str(root / "data" / "data.csv"))
    rows.to_parquet(str(root / "data" / "data.parquet"))
    return [*folders, root / "adapter", root / "recipe", root / "data"]


def arguments(folder: Path) -> TrainingArguments:
    chosen: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "report_to": "none"}
    return TrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **chosen)


def damage(folder: Path, dice: random.Random, others: list[Path]) -> None:
    """Changes the bytes of one file, or which file it is."""
    path = dice.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    content = bytearray(path.read_bytes())
    place = dice.randrange(len(content)) if content else 0
    kind = dice.choice(["flip", "cut", "drop", "insert", "zero", "repeat", "swap", "remove"])
    if kind == "flip":
        for _ in range(dice.choice([1, 1, 1, 20])):
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "drop":
        del content[place : place + dice.randrange(1, 64)]
    elif kind == "insert":
        content[place:place] = dice.choice([b"\0" * 9, b"[" * 100_000, b'{"a":' * 50_000, dice.randbytes(16), b"\xff"])
    elif kind == "zero":
        content[place : place + 32] = bytes(len(content[place : place + 32]))
    elif kind == "repeat":
        content[place:place] = content[place : place + 200]
    elif kind == "swap":
        other = dice.choice([file for each in others for file in each.iterdir() if file.is_file()])
        content = bytearray(other.read_bytes())
    path.unlink() if kind == "remove" else path.write_bytes(bytes(content))


def forge(folder: Path, dice: random.Random) -> None:
    """Changes JSON or tensors of a posterior, and renews the checksums."""
    meta = json.loads((folder / "posterior.json").read_text())
    kind = dice.choice(["meta", "meta", "adapter", "tensors"])
    if kind == "meta":
        replace_somewhere(meta, dice)
    elif kind == "adapter":
        config = json.loads((folder / "adapter_config.json").read_text())
        replace_somewhere(config, dice)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        meta["adapter_sha256"] = digest(folder / "adapter_config.json")
    else:
        path = folder / "posterior.safetensors"
        state = load_file(path)
        name = dice.choice(sorted(state))
        value = state.pop(name)
        changed = dice.choice(["type", "shape", "name", "gone", "nan", "header"])
        if changed != "gone":
            new = {"type": value.to(dice.choice([torch.float16, torch.int8, torch.bool])), "shape": value.flatten()[1:]}
            new["nan"] = torch.full_like(value, float("nan"))
            state[name + "x" * (changed == "name")] = new.get(changed, value)
        save_file(state, path)
        if changed == "header":
            path.write_bytes(dice.choice([2**63 - 1, 2**31, 0]).to_bytes(8, "little") + path.read_bytes()[8:])
        meta["sha256"] = digest(path)
    write_json(folder / "posterior.json", sealed(meta))


def replace_somewhere(content: dict[str, Any], dice: random.Random) -> None:
    """Another value, or none, at a random depth of a JSON object."""
    here: Any = content
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = dice.choice(keys)
        if isinstance(here[key], dict | list) and here[key] and dice.random() < 0.8:
            here = here[key]
            continue
        if dice.random() < 0.2:
            del here[key]
        elif isinstance(here, dict) and dice.random() < 0.1:
            here[dice.choice(["megatron_config", "extra", "class", "init", "custom", "__class__"])] = dice.choice(
                HOSTILE
            )
        else:
            here[key] = dice.choice(HOSTILE)
        return


def read(folder: Path, kind: str, whole: Path | None) -> None:
    """Reads all that a folder holds, as far as its kind has a reader; checks what must not have changed."""
    if kind.startswith("posterior"):
        posterior = Posterior.from_pretrained(folder, tiny_bert(), task=sentence_task())
        posterior.draw(2)
        if whole is not None:
            original = load_file(whole / "posterior.safetensors")
            state = posterior.guide.state_dict()
            assert all(torch.equal(state[name], value) for name, value in original.items()), "read other weights"
            assert repr(posterior) == repr(Posterior.from_pretrained(whole, tiny_bert(), task=sentence_task()))
    elif kind == "checkpoint":
        with tempfile.TemporaryDirectory() as run:
            shutil.copytree(folder, Path(run) / "checkpoint-1")
            posterior = fit(tiny_program(), MeanField(), args=arguments(Path(run)), resume=True)
            torch.testing.assert_close(dict(posterior.guide.state_dict()), twice())
    elif kind == "adapter":
        load_adapter(tiny_bert(), folder)
    elif kind == "recipe":
        recipe = Recipe.read(folder / "recipe.yaml")
        recipe.build_priors()
        recipe.build_adapter()
        recipe.arguments(None, seed=0)
        recipe.build_guide("MeanField")
    else:
        for path in sorted(folder.iterdir()):
            SequenceClassification(tokenizer(), train=str(path), max_length=16)


@functools.cache
def twice() -> dict[str, Any]:
    """The state of a run that was not interrupted, which is also that of one whose checkpoint is passed over."""
    with tempfile.TemporaryDirectory() as run:
        return dict(fit(tiny_program(), MeanField(), args=arguments(Path(run))).guide.state_dict())


def outcome(action: Callable[[], None]) -> tuple[str, str]:
    """``loaded``, ``refused`` or ``unexpected``, and the error."""
    signal.alarm(SECONDS)
    try:
        action()
    except OURS as error:
        return "refused", type(error).__name__
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "unexpected", f"{type(error).__name__}: {str(error)[:150]!r} at {Path(last.filename).name}:{last.lineno}"
    finally:
        signal.alarm(0)
    return "loaded", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    quieten()
    found: Counter[tuple[str, str]] = Counter()
    errors: dict[str, int] = {}
    start, done = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as scratch:
        folders = prepare(Path(scratch))
        copy = Path(scratch) / "copy"
        while done < chosen.iterations and time.perf_counter() - start < chosen.seconds:
            dice = random.Random(chosen.seed * 1_000_003 + done)
            whole = dice.choice(folders)
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(whole, copy)
            forged = whole.name.startswith("posterior") and dice.random() < 0.6
            forge(copy, dice) if forged else damage(copy, dice, folders)
            result, error = outcome(lambda kind=whole.name, of=None if forged else whole: read(copy, kind, of))
            found[whole.name.partition("-")[0] + (", forged" if forged else ""), result] += 1
            if result == "unexpected":
                errors.setdefault(f"{whole.name}: {error}", done)
            done += 1
    results = {kind: {r: found[kind, r] for r in ("refused", "loaded", "unexpected")} for kind, _ in sorted(found)}
    print(json.dumps({"iterations": done, "seed": chosen.seed, "results": results, "first seen at": errors}, indent=2))
    sys.exit(bool(errors))


def quieten() -> None:
    """Only the result is printed."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"over {SECONDS} s")))


if __name__ == "__main__":
    main()
