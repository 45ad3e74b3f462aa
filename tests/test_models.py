"""The recipes in models/, each with its architecture shrunk and small data in place of the hub's."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

from pyrolora.diagnostics.estimate import estimate
from pyrolora.guides.base import Guide
from pyrolora.inference.fit import fit
from pyrolora.inference.randomness import isolated
from pyrolora.recipe import Recipe
from tests.architectures import PARAMETERS, PUBLISHED, shrunk
from tests.programs import CHATML
from tests.programs import tokenizer as minilm

RECIPES = sorted((Path(__file__).parents[1] / "models").glob("*.yaml"))

Row = Mapping[str, Any]


def _science(i: int) -> Row:
    """Both of AI2's sets keep texts and names of the choices in one column; ARC names some choices by numbers."""
    names = list("ABCD") if i % 3 else list("1234")
    texts = ["a rock", "a tree", "the sun", "the sea"]
    return {"choices": {"text": texts, "label": names}, "answerKey": names[i % 4]}


def _lettered(i: int) -> Row:
    return {"choices": {"text": ["oak", "elm", "ash", "fir"], "label": list("ABCD")}, "answerKey": "ABCD"[i % 4]}


def picture(i: int, size: int) -> Image.Image:
    """A square of one colour and noise."""
    noise = np.random.default_rng(i).integers(0, 60, (size, size, 3))
    return Image.fromarray((noise + 19 * (i % 10)).astype(np.uint8))


# Hub name and configuration to its splits and a function that makes row i: columns and types as the hub's.
HUB: Mapping[tuple[str, str | None], tuple[tuple[str, ...], Callable[[int], Row]]] = {
    ("nyu-mll/glue", "sst2"): (
        ("train", "validation", "test"),
        lambda i: {"sentence": ["a warm film", "a dull film"][i % 2], "label": i % 2, "idx": i},
    ),
    ("allenai/openbookqa", "main"): (
        ("train", "validation", "test"),
        lambda i: {"id": str(i), "question_stem": "What grows?", **_lettered(i)},
    ),
    **{
        ("allenai/ai2_arc", name): (
            ("train", "validation", "test"),
            lambda i: {"id": str(i), "question": "What is hot?", **_science(i)},
        )
        for name in ("ARC-Challenge", "ARC-Easy")
    },
    **{
        ("cais/mmlu", f"college_{name}"): (
            ("test", "validation", "dev"),
            lambda i: {"question": "Which?", "subject": "college", "choices": ["1", "2", "3", "4"], "answer": i % 4},
        )
        for name in ("chemistry", "physics")
    },
    ("tau/commonsense_qa", None): (
        ("train", "validation", "test"),
        lambda i: {
            "id": str(i),
            "question": "Where do fish live?",
            "question_concept": "fish",
            "choices": {"label": list("ABCDE"), "text": ["sea", "sky", "tree", "sofa", "sand"]},
            "answerKey": "ABCDE"[i % 5],
        },
    ),
    **{
        ("ehovy/race", name): (
            ("train", "validation", "test"),
            lambda i: {
                "example_id": f"{i}.txt",
                "article": "Ann has a red hat. " * 40,
                "answer": "ABCD"[i % 4],
                "question": "What has Ann?",
                "options": ["a hat", "a cat", "a bat", "a mat"],
            },
        )
        for name in ("high", "middle")
    },
    ("allenai/winogrande", "winogrande_s"): (
        ("train", "validation", "test"),
        lambda i: {
            "sentence": "The trophy does not fit into the case because the _ is too big.",
            "option1": "trophy",
            "option2": "case",
            "answer": "12"[i % 2],
        },
    ),
    ("google/boolq", None): (
        ("train", "validation"),
        lambda i: {"question": "is ice cold", "answer": i % 2 == 0, "passage": "Ice is frozen water. " * 30},
    ),
    ("uoft-cs/cifar10", None): (("train", "test"), lambda i: {"img": picture(i, 32), "label": i % 10}),
    ("ufldl-stanford/svhn", "cropped_digits"): (
        ("train", "test", "extra"),
        lambda i: {"image": picture(i, 32), "label": i % 10},
    ),
    ("Salesforce/wikitext", "wikitext-2-raw-v1"): (
        ("train", "validation", "test"),
        lambda i: {"text": ["", " = A title = \n", " A paragraph of some twenty words and more . \n"][i % 3]},
    ),
}


def hub(path: str, config: str | None, *, split: str) -> datasets.Dataset:
    """What `datasets.load_dataset` would return, 40 rows of it."""
    splits, row = HUB[path, config]
    assert split.partition("[")[0] in splits, f"{path} has no split {split}"
    return datasets.Dataset.from_list([dict(row(i)) for i in range(40)])


def byte_pairs() -> PreTrainedTokenizerBase:
    """A byte-level tokenizer like those of causal models, in which each answer is one token; it has no padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["Answer: A B C D E no yes " * 20, "Question: What" * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=CHATML)


def small(path: Path, folder: Path) -> Recipe:
    """The recipe with a random base of its architecture in the folder; nothing else of the model changes."""
    recipe = Recipe.read(path)
    task = dict(recipe.task) if isinstance(recipe.task, dict) else {"class_path": recipe.task}
    causal = task["class_path"] in ("AnswerTokenChoice", "LanguageModeling")
    tokenizer = byte_pairs() if causal else minilm()
    if task["class_path"] == "ImageClassification":
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    config = shrunk(PUBLISHED[recipe.base], len(tokenizer))
    config.pad_token_id = None if causal else tokenizer.pad_token_id
    with isolated(0):
        (AutoModelForCausalLM if causal else AutoModel).from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if task["class_path"] == "PhysicalCommonsense":
        sizes = {"num_train": 16, "num_validation": 4, "num_test": 4, "num_ood": 0}
        task = {**task, "init_args": {**task["init_args"], **sizes}}
    return dataclasses.replace(recipe, base=str(folder), task=task)


def moved(guide: Guide, fresh: Guide) -> list[str]:
    """The parameters that training has changed."""
    return [
        name
        for (name, value), start in zip(guide.named_parameters(), fresh.parameters(), strict=True)
        if not torch.equal(value, start)
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: with data as the hub has them, one step of a point estimate and one of a guide with random sites change
    their parameters, the objective is finite, and the posteriors judge new rows."""
    monkeypatch.setattr(datasets, "load_dataset", hub)
    recipe = small(path, tmp_path)
    if recipe.quantization:
        pytest.importorskip("bitsandbytes")
    task = recipe.build_task()
    program = recipe.build_program(task)
    assert task.test is not None and len(program.sites) >= 2
    checkpointed = recipe.training.get("gradient_checkpointing", False)
    for name in ("MAP", "Inducing" if "inducing" in path.stem else "MeanField"):
        chosen = recipe.adjusted(name, {}, {"max_steps": 1, "per_device_train_batch_size": 2, "warmup_steps": 0}, None)
        guide = chosen.build_guide(name)
        arguments = chosen.arguments(None, seed=0)
        posterior = fit(program, guide, args=arguments, temperature=chosen.temperature_of(name))
        guide.bind(program)
        assert moved(posterior.guide, guide)
        assert program._is_checkpointing() == checkpointed
        assert bool(guide.random_sites()) == (name != "MAP")
        nats = posterior.log_likelihood(task.test.select(range(2)), 2)
        assert torch.isfinite(torch.as_tensor(nats)).all()
        assert all(math.isfinite(row["loss"]) for row in posterior.history if "loss" in row)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_published_sizes(name: str) -> None:
    """Law: the sizes from which memory is computed give the number of parameters that the authors publish."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(PUBLISHED[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_every_recipe_says_what_it_needs() -> None:
    """Law: the comments above a recipe say where its data come from and what it needs."""
    for path in RECIPES:
        head = path.read_text(encoding="utf-8").partition("\nbase:")[0]
        assert "Needs: " in head, path
        assert "Data: " in head or "embedded" in head, path


@pytest.mark.parametrize("name", ["roberta-sst2", "gpt2-wikitext2", "vit-cifar10"])
def test_quoted_memory_is_computed(name: str, tmp_path: Path) -> None:
    """Law: the memory in a recipe's comments is the estimate at the published size (the larger ones: see
    benchmarks/recipe_memory.py)."""
    path = next(path for path in RECIPES if path.stem == name)
    recipe = Recipe.read(path)
    PUBLISHED[recipe.base].save_pretrained(tmp_path)
    found = estimate(recipe, "MeanField", config=tmp_path)
    quoted = re.findall(r"([\d.]+) GiB", path.read_text(encoding="utf-8"))
    assert quoted[:2] == [f"{sum(parts.values()) / 2**30:.1f}" for parts in (found.fit, found.predict)]
