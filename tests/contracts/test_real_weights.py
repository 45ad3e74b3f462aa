"""Doubt on real weights: a small language model, adapted to one kind of text, and texts of other kinds."""

from __future__ import annotations

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
from tests.benchmarks.real_text import shuffled, uncertainty, weather

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
    shuffled reports than in unseen ones, and higher in text about other things."""
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
    found = {name: uncertainty(posterior, data, 4) for name, data in whole.items()}
    for name in ("shuffled", "foreign"):
        for score in ("entropy", "mutual information"):
            area = auroc(found["unseen"][score], found[name][score])
            assert area > 0.9, f"{name}, {score}: {area:.3f}"
