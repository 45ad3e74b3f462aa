"""A small recipe on disk that many tests share: a random BERT without head, its tokenizer, generated sentences."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from pyrolora.guides.mean_field import MeanField
from pyrolora.recipe import Recipe
from pyrolora.saved import save
from tests.programs import language_posterior, sentences, tiny_bert, tiny_llama, tokenizer

CONTENT: Mapping[str, Any] = {
    "base": "base",
    "adapter": {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    "priors": {
        "*.A": {"class_path": "Normal", "init_args": {"scale": 0.1}},
        "*.B": "Flat",
        "head.*": {"class_path": "Normal", "init_args": {"scale": 1.0}},
    },
    "task": {
        "class_path": "SequenceClassification",
        "init_args": {
            "train": "train.jsonl",
            "validation": "validation.jsonl",
            "test": "test.jsonl",
            "ood": {"far": "far.jsonl", "unknown": "unknown.jsonl"},
            "max_length": 16,
        },
    },
    "training": {"max_steps": 3, "logging_steps": 1},
}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Writes the recipe with all it needs into a folder; ``changes`` replace its keys, None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        tiny_bert().bert.save_pretrained(folder / "base")
        tokenizer().save_pretrained(str(folder / "base"))
        for seed, (split, size) in enumerate({"train": 24, "validation": 16, "test": 12, "far": 6}.items()):
            write_rows(folder / f"{split}.jsonl", list(sentences(size, seed)))
        write_rows(folder / "unknown.jsonl", [{"text": "a cold river", "label": 7}])
    content = {name: value for name, value in {**CONTENT, **changes}.items() if value is not None}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def save_language(folder: Path) -> Path:
    """Saves a posterior over a tiny Llama with its recipe, and returns where."""
    tiny_llama().save_pretrained(folder / "base")
    tokenizer().save_pretrained(str(folder / "base"))
    write_rows(folder / "train.jsonl", [{"text": "the cold stone lies in a warm house while dark water runs"}])
    recipe = write_recipe(
        folder,
        adapter={"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
        task={"class_path": "LanguageModeling", "init_args": {"train": "train.jsonl", "max_length": 8}},
    )
    return save(language_posterior(MeanField(random="*")), Recipe.read(recipe), folder / "run")
