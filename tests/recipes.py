"""A small recipe on disk that many tests share: a random BERT without head, its tokenizer, generated sentences."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.programs import sentences, tiny_bert, tokenizer

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
