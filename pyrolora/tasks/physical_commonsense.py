"""The embedded default task: yes/no comparisons of everyday things, made from a table; nothing is downloaded.

"Is a bowling ball heavier than a pillow?" The table beside this file, `physical_commonsense.csv`, holds 470 animals,
vehicles, foods, tools, structures, plants and hot or cold things, with typical values of the attributes that make
sense for them:

    mass_kg           of the whole thing, empty unless its name says otherwise
    length_m          the largest extent: tail included, height for what stands upright, bill to tail for birds
    temperature_c     where a natural or usual temperature exists; compared in kelvin
    lifespan_years    what an individual usually reaches once grown
    top_speed_m_s     of animals and vehicles at their fastest (a falcon's dive counts), of balls and missiles in play

Values are typical, not exact: things within some ten per cent of each other are honest doubt.

**Splits.** Each *thing* belongs to one of train, validation and test (2 : 1 : 2, evenly over categories), and a
question compares two things of its own split: nothing asked about in the test was seen in training. The
out-of-distribution split asks about the test's things, but about an attribute whose words and facts occur nowhere
else, so that between `test` and `ood` only the attribute changes. That attribute is top speed, because it does not
follow size: mass, length and lifespan grow together, so that "bigger" would half answer questions about any of these
were it the hidden one, whereas falcon, bullet and cheetah outrun what is larger. A model ought to be less sure there.

**Distribution.** In every split and attribute one pair in ten comes from the tenth of all pairs that lie closest,
|log ratio| being the measure, the others uniformly from the rest; exact ties are left out, and no pair is asked about
twice. So the test's median pair differs by a factor of about 100 in mass, 12 in length, 5 in lifespan and 1.6 in
kelvin, and by less than a factor of 1.2 are 3, 3, 5 and 31 per cent of the pairs (7 per cent of speeds).

**Who is claimed to be the greater.** In a close pair either. In other pairs the question claims it of the more
remarkable thing, the one farther from the middle of its split's ranking: "Is a blue whale heavier than a chair?", "Is
a chair lighter than a grape?". The answer is then yes where the remarkable thing is large, whatever the wording, and a
small encoder can learn from 400 examples which things are large. Without this rule the answer is an exclusive or of
polarity, order and size: MiniLM learns the training set by heart and stays at chance on the test, and nothing could be
said about its uncertainty. A close pair stays a coin toss for whoever knows only what is large.

**Wording.** Fourteen or sixteen templates an attribute, half of them asking for more ("heavier"), half for less
("lighter"); each is used equally often with either answer, so that the words around the things do not tell the label.
"""

from __future__ import annotations

import csv
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, cycle, islice
from pathlib import Path
from typing import TypedDict

import datasets
from transformers import PreTrainedTokenizerBase

from pyrolora.tasks.sequence_classification import SequenceClassification

ATTRIBUTES: dict[str, str] = {
    "mass": "mass_kg",
    "length": "length_m",
    "temperature": "temperature_c",
    "lifespan": "lifespan_years",
    "top_speed": "top_speed_m_s",
}
"""Attribute → column of the table; the column's name ends in the unit."""

OOD_ATTRIBUTE = "top_speed"
SHARES: dict[str, float] = {"mass": 0.35, "length": 0.3, "temperature": 0.15, "lifespan": 0.2}
"""Part of an in-distribution split that asks about an attribute; less where fewer things have a value."""

CLASS_NAMES = ("no", "yes")
THING_SPLITS = ("train", "test", "validation", "test", "train")
CLOSE_PART = 0.1
KELVIN_AT_ZERO_CELSIUS = 273.15

# [more|less]: each line makes one template that asks whether {a} has more and one that asks whether it has less.
FRAMES: dict[str, tuple[str, ...]] = {
    "mass": (
        "Is {a} [heavier|lighter] than {b}?",
        "Does {a} weigh [more|less] than {b}?",
        "Would {a} weigh [more|less] than {b}?",
        "On a balance scale, would {a} [outweigh|be outweighed by] {b}?",
        "Compared with {b}, is {a} the [heavier|lighter] one?",
        "Is it true that {a} has [more|less] mass than {b}?",
        "{a} is [heavier|lighter] than {b}, right?",
        "Are {As} usually [heavier|lighter] than {Bs}?",
    ),
    "length": (
        "Is {a} [longer|shorter] than {b}?",
        "Is {a} [longer|shorter] from end to end than {b}?",
        "Measured along its longest side, is {a} [longer|shorter] than {b}?",
        "Laid out next to {b}, would {a} be the [longer|shorter] one?",
        "Compared with {b}, does {a} have the [greater|smaller] length?",
        "Is it true that {a} is [longer|shorter] than {b}?",
        "{a} is [longer|shorter] than {b}, right?",
        "Are {As} usually [longer|shorter] than {Bs}?",
    ),
    "temperature": (
        "Is {a} [hotter|colder] than {b}?",
        "Is {a} [warmer|cooler] than {b}?",
        "Is {a} at a [higher|lower] temperature than {b}?",
        "Would you expect {a} to be [hotter|colder] than {b}?",
        "Compared with {b}, is {a} the [hotter|colder] one?",
        "Is it true that {a} is [warmer|cooler] than {b}?",
        "{a} is [hotter|colder] than {b}, right?",
    ),
    "lifespan": (
        "Does {a} [live longer|have a shorter life] than {b}?",
        "Is the lifespan of {a} [longer|shorter] than that of {b}?",
        "Does {a} usually [reach a greater|die at a younger] age than {b}?",
        "Starting life on the same day, would {a} [outlive|die before] {b}?",
        "Compared with {b}, does {a} have the [longer|shorter] life?",
        "Is it true that {a} [lives longer|dies younger] than {b}?",
        "{a} has a [longer|shorter] lifespan than {b}, right?",
        "Do {As} usually live [longer|shorter] lives than {Bs}?",
    ),
    "top_speed": (
        "Is {a} [faster|slower] than {b}?",
        "At its fastest, does {a} move [faster|more slowly] than {b}?",
        "Is the top speed of {a} [higher|lower] than that of {b}?",
        "At full speed, would {a} [overtake|fall behind] {b}?",
        "Compared with {b}, is {a} the [faster|slower] one?",
        "Is it true that {a} has a [higher|lower] top speed than {b}?",
        "{a} is [faster|slower] than {b}, right?",
        "Are {As} [faster|slower] than {Bs} at their best?",
    ),
}

TEMPLATES: dict[str, tuple[list[str], list[str]]] = {
    attribute: (
        [re.sub(r"\[(.*?)\|(.*?)\]", r"\1", frame) for frame in frames],
        [re.sub(r"\[(.*?)\|(.*?)\]", r"\2", frame) for frame in frames],
    )
    for attribute, frames in FRAMES.items()
}
"""Attribute → templates that ask whether {a} has more, and whether it has less; {As} and {Bs} are plurals."""


class Row(TypedDict):
    """One question: `label` indexes `CLASS_NAMES`; `log_ratio` is ln(value of the thing asked about / of the other)."""

    id: str
    text: str
    label: int
    attribute: str
    log_ratio: float


@dataclass(frozen=True)
class Thing:
    """One row of the table: how it is called, and its typical values by attribute (units: `ATTRIBUTES`)."""

    name: str
    article: str
    plural: str
    category: str
    values: Mapping[str, float]

    @property
    def phrase(self) -> str:
        """The name with its article, "an axe"; a mass noun, "lava", has none."""
        return f"{self.article} {self.name}".strip()

    def log_value(self, attribute: str) -> float:
        """ln of the value, in the column's unit; of the absolute temperature in kelvin."""
        value = self.values[attribute]
        return math.log(value + KELVIN_AT_ZERO_CELSIUS if attribute == "temperature" else value)


@dataclass(frozen=True)
class Pair:
    """Two things that differ in an attribute, the greater one first, and how far apart they are, ln ratio > 0.

    `remarkable` is the one that a question claims to be the greater; None where it may be either.
    """

    greater: Thing
    smaller: Thing
    log_ratio: float
    remarkable: Thing | None

    def admits(self, label: int, template: str) -> bool:
        """Whether the template can be said of both with that answer: a plural needs two things that have one."""
        speakable = "{As}" not in template or bool(self.greater.plural and self.smaller.plural)
        return speakable and self.remarkable in (None, self.greater if label else self.smaller)


@cache
def load_table() -> tuple[Thing, ...]:
    """The table of things, in the order of the file."""
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Thing(
                name=row["name"],
                article=row["article"],
                plural=row["plural"],
                category=row["category"],
                values={attribute: float(row[column]) for attribute, column in ATTRIBUTES.items() if row[column]},
            )
            for row in csv.DictReader(file)
        )


def split_things(*, data_seed: int = 0) -> dict[str, list[Thing]]:
    """Give every thing to train, validation or test, 2 : 1 : 2, evenly over categories and known attributes."""
    generator = random.Random(f"{data_seed}/things")
    ordered = sorted(load_table(), key=lambda thing: (thing.category, sorted(thing.values), generator.random()))
    splits: dict[str, list[Thing]] = {"train": [], "validation": [], "test": []}
    for thing, split in zip(ordered, cycle(THING_SPLITS), strict=False):
        splits[split].append(thing)
    return splits


def generate(
    num_train: int = 400, num_validation: int = 400, *, num_test: int = 1000, num_ood: int = 500, data_seed: int = 0
) -> dict[str, list[Row]]:
    """Questions for every split, without a tokenizer: {"train", "validation", "test", "ood"} → rows in random order.

    A split depends on its own size and on `data_seed` alone: asking for more training questions leaves the test as it
    is. Half of the answers are yes, half no (one more yes where the size is odd). Sizes may be 0.

    Raises:
        ValueError: a size is negative or asks for more questions than there are pairs of things in the split.
    """
    sizes = {"train": num_train, "validation": num_validation, "test": num_test, "ood": num_ood}
    things = split_things(data_seed=data_seed)
    things["ood"] = things["test"]
    rows = {}
    for split, size in sizes.items():
        if size < 0:
            raise ValueError(f"num_{split}={size}: ask for 0 questions or more.")
        shares = {OOD_ATTRIBUTE: 1.0} if split == "ood" else SHARES
        rows[split] = _questions(split, things[split], size, shares, random.Random(f"{data_seed}/{split}"))
    return rows


def _questions(
    split: str, things: Sequence[Thing], size: int, shares: Mapping[str, float], generator: random.Random
) -> list[Row]:
    """`size` questions about `things`, the attributes by `shares`, each answer equally often."""
    counts = {label: _apportion((size + label) // 2, shares) for label in (0, 1)}
    questions = []
    for attribute in shares:
        wordings = [
            (label, template)
            for label in (0, 1)
            for template in _rotation(attribute, counts[label][attribute], generator)
        ]
        generator.shuffle(wordings)
        pairs = _draw_pairs(split, attribute, things, wordings, generator)
        questions += [_ask(attribute, *wording, pair) for wording, pair in zip(wordings, pairs, strict=True)]
    generator.shuffle(questions)
    for index, row in enumerate(questions):
        row["id"] = f"{split}-{index:04d}"
    return questions


def _apportion(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers that sum to `total` and follow `shares` (largest remainder)."""
    counts = {name: math.floor(total * share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - total * shares[name])
    for name in islice(cycle(by_remainder), total - sum(counts.values())):
        counts[name] += 1
    return counts


def _rotation(attribute: str, count: int, generator: random.Random) -> Iterator[str]:
    """`count` templates, all used equally often (to within one), in random order."""
    templates = [template for polarity in TEMPLATES[attribute] for template in polarity]
    generator.shuffle(templates)
    return islice(cycle(templates), count)


def _all_pairs(attribute: str, things: Sequence[Thing]) -> tuple[list[Pair], list[Pair]]:
    """All pairs of things whose values differ: the `CLOSE_PART` that lies closest, and the rest."""
    known = sorted((t for t in things if attribute in t.values), key=lambda t: t.log_value(attribute))
    ranked = [(thing, abs(rank - (len(known) - 1) / 2)) for rank, thing in enumerate(known)]
    pairs = sorted(
        (
            (greater.log_value(attribute) - smaller.log_value(attribute), greater, smaller, far_up - far_down)
            for (smaller, far_down), (greater, far_up) in combinations(ranked, 2)
            if greater.values[attribute] > smaller.values[attribute]
        ),
        key=lambda pair: pair[0],
    )
    cut = round(CLOSE_PART * len(pairs))
    close = [Pair(greater, smaller, gap, None) for gap, greater, smaller, _ in pairs[:cut]]
    apart = [
        Pair(greater, smaller, gap, None if lead == 0 else greater if lead > 0 else smaller)
        for gap, greater, smaller, lead in pairs[cut:]
    ]
    return close, apart


def _draw_pairs(
    split: str,
    attribute: str,
    things: Sequence[Thing],
    wordings: Sequence[tuple[int, str]],
    generator: random.Random,
) -> list[Pair]:
    """One pair for each (label, template), none twice; `CLOSE_PART` of them close."""
    close, apart = _all_pairs(attribute, things)
    total = len(close) + len(apart)
    generator.shuffle(close)
    generator.shuffle(apart)
    chosen = []
    for label, template in wordings:
        # Where one part is used up the other stands in: the size of a split is kept, its hardness gives way.
        first, second = (close, apart) if generator.random() < CLOSE_PART else (apart, close)
        candidates = ((i, part) for part in (first, second) for i, p in enumerate(part) if p.admits(label, template))
        found = next(candidates, None)
        if found is None:
            raise ValueError(
                f"num_{split} asks for {len(wordings)} questions about {attribute}, but the {split} things make only "
                f"{total} pairs, not all of which suit every wording. Choose a smaller num_{split}."
            )
        position, part = found
        chosen.append(part.pop(position))
    return chosen


def _ask(attribute: str, label: int, template: str, pair: Pair) -> Row:
    """Fill the template so that its answer is `label`: about the greater thing for "more" and yes, or "less" and no."""
    subject_is_greater = (template in TEMPLATES[attribute][0]) == bool(label)
    a, b = (pair.greater, pair.smaller) if subject_is_greater else (pair.smaller, pair.greater)
    text = template.format(a=a.phrase, b=b.phrase, As=a.plural, Bs=b.plural)
    return Row(
        id="",
        text=text[0].upper() + text[1:],
        label=label,
        attribute=attribute,
        log_ratio=pair.log_ratio if subject_is_greater else -pair.log_ratio,
    )


class PhysicalCommonsense(SequenceClassification):
    """Yes/no comparisons of everyday things: 400 training examples, no download, and a hidden attribute as `ood`.

    The splits keep the columns `id`, `attribute` and `log_ratio` beside text, label and tokens; `ood` has the one
    entry `OOD_ATTRIBUTE`. A split of size 0 is None (left out of `ood`).

    Args:
        tokenizer: the base model's tokenizer; it must have a padding token.
        num_train: how many questions to train on, at least 1.
        num_validation: how many to validate on, 0 for none.
        num_test: how many to test on, 0 for none.
        num_ood: how many about the hidden attribute, 0 for none.
        max_length: the most tokens of a question; none has more than about 30.
        data_seed: which things go to which split, and which questions are asked of them.

    Raises:
        ValueError: there are not that many questions, or none to train on.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_train: int = 400,
        num_validation: int = 400,
        num_test: int = 1000,
        num_ood: int = 500,
        max_length: int = 64,
        data_seed: int = 0,
    ) -> None:
        if num_train < 1:
            raise ValueError(f"num_train={num_train}: a task needs at least 1 question to train on.")
        rows = generate(num_train, num_validation, num_test=num_test, num_ood=num_ood, data_seed=data_seed)
        splits = {name: datasets.Dataset.from_list([dict(row) for row in part]) for name, part in rows.items() if part}
        super().__init__(
            tokenizer,
            train=splits["train"],
            validation=splits.get("validation"),
            test=splits.get("test"),
            ood={OOD_ATTRIBUTE: splits["ood"]} if "ood" in splits else None,
            class_names=CLASS_NAMES,
            max_length=max_length,
        )
