"""Doubt on real weights: a small language model adapted to one kind of text, texts of other kinds, and wrong words."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from pyrolora.diagnostics.ood import auroc
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.inference.randomness import isolated
from pyrolora.priors.flat import Flat
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from pyrolora.tasks.language_modeling import LanguageModeling
from tests.benchmarks.real_text import at_words, block_means, replaced, rise, shuffled, uncertainty, weather

SHARED = Path(__file__).parents[3] / "shared"
STORIES = SHARED / "models" / "stories260K"
LENGTH = 32
FOREIGN = [
    "The committee rejected the second proposal, although its author had revised every chapter of the report.",
    "Copper conducts heat and electricity well, which is why engineers choose it for cables and for cooking pots.",
    "In the third act the prince learns that his brother, whom everyone believed dead, has raised an army abroad.",
    "A proof by induction has two parts: the first case, and the step that leads from each case to the next one.",
    "Her grandmother kept bees behind the old mill and sold their honey at the market in the nearest town.",
    "Inflation fell for the fifth month in a row, but the central bank left its interest rate where it was.",
]


def of(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts})


@pytest.mark.skipif(not STORIES.is_dir(), reason="the small Llama is not here")
def test_doubt_tells_other_text_and_wrong_text() -> None:
    """Law: after forty steps on reports of the weather, mutual information and entropy of the tokens are higher in
    shuffled reports than in unseen ones, and higher in text about other things. Where a word of an unseen report was
    replaced by another, the draws disagree about its tokens, and mutual information and entropy of those that follow
    rise, by more than chance."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.pad_token = tokenizer.eos_token
    unseen = weather(12, 1)
    others = {"unseen": of(unseen), "shuffled": of(shuffled(unseen)), "foreign": of(FOREIGN)}
    task = LanguageModeling(tokenizer, train=of(weather(150, 0)), ood=others, max_length=LENGTH)
    with isolated(0):
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = task.load_base_model(str(STORIES))
        program = PyroLoRA(model, lora, priors={"*.A": Normal(0.2), "*.B": Flat()}, task=task)
    arguments = default_arguments(None, seed=0)
    arguments.max_steps, arguments.learning_rate, arguments.per_device_train_batch_size = 40, 5e-3, 8
    posterior = fit(program, MeanField(), args=arguments, temperature=0.05)
    whole = {name: data.filter(lambda row: len(row["input_ids"]) == LENGTH) for name, data in task.ood.items()}
    tables = {name: uncertainty(posterior, data, 4) for name, data in whole.items()}
    found = {name: block_means(table) for name, table in tables.items()}
    for name in ("shuffled", "foreign"):
        for score in ("entropy", "mutual information"):
            area = auroc(found["unseen"][score], found[name][score])
            assert area > 0.9, f"{name}, {score}: {area:.3f}"
    wrong, places = replaced(whole["unseen"], task.train, tokenizer, 0)
    assert len(places) > 30
    tables["wrong"] = uncertainty(posterior, wrong, 4)
    for behind, scores in ((False, ("NLL", "disagreement")), (True, ("entropy", "mutual information"))):
        before, after = (at_words(tables[name], places, behind=behind) for name in ("unseen", "wrong"))
        for score in scores:
            assert rise(before[score], after[score], places).low > 0, score
            assert auroc(before[score], after[score]) > 0.6, score


@pytest.mark.skipif(not STORIES.is_dir(), reason="the small Llama is not here")
def test_replaced_words_keep_their_places() -> None:
    """Law: blocks with replaced words are as long as they were and equal to them elsewhere; each word is replaced whole
    by another word of the training text, no two stand close, and the same seed replaces the same."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.pad_token = tokenizer.eos_token
    others = {"unseen": of(weather(12, 1))}
    task = LanguageModeling(tokenizer, train=of(weather(50, 0)), ood=others, max_length=64)
    data = task.ood["unseen"].filter(lambda row: len(row["input_ids"]) == 64)
    wrong, places = replaced(data, task.train, tokenizer, 3)
    again, same = replaced(data, task.train, tokenizer, 3)
    assert again["input_ids"][:] == wrong["input_ids"][:] and same == places
    known = set(re.findall(r"[A-Za-z]+", " ".join(weather(50, 0))))
    for row, (before, after) in enumerate(zip(data["input_ids"], wrong["input_ids"], strict=True)):
        own = [(start, stop) for r, start, stop in places if r == row]
        changed = {t for start, stop in own for t in range(start, stop)}
        assert 1 <= len(own) <= 3 and len(before) == len(after)
        assert {t for t in range(64) if before[t] != after[t]} <= changed
        for start, stop in own:
            words = [tokenizer.decode(ids[start:stop]).strip() for ids in (before, after)]
            assert words[0] != words[1] and set(words) <= known
        assert all(a + 8 <= b for (_, a), (b, _) in itertools.pairwise(sorted(own)))
