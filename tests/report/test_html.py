from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from PIL import Image

from pyrolora.report.html import render, write_picture, write_report

VOID = {"meta", "link", "br", "img", "hr", "input"}
EVIL = '<script>alert("x")</script><img src="http://evil.example/x.png" onerror="alert(1)">\'" onload="x'


class Page(HTMLParser):
    """Collects what the laws below speak of, and refuses unbalanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.tables: list[set[str]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.stack)))
        if tag == "table":
            self.tables.append(set())
        elif self.tables and "table" in self.stack:
            self.tables[-1].add(tag)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.stack)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("style", "title"):
            self.words += data


def metrics(nll: float) -> dict:
    values = {"accuracy": 0.8, "nll": nll, "ece": nll / 7, "brier": 0.3, "adaptive_ece": 0.05, "mce": 0.2}
    return {name: {"value": value, "low": value - 0.01, "high": value + 0.01} for name, value in values.items()}


def cell(method: str, nll: float, *, seed: int = 0, split: str = "test", text: str = "a fine film") -> dict:
    draws = [[0.9, 0.1], [0.2, 0.8], [0.95, 0.05]]
    return {
        "method": method,
        "description": f"about {method}",
        "seed": seed,
        "split": split,
        "metrics": metrics(nll),
        "scaling": 1.42,
        "scaled_metrics": metrics(nll - 0.1),
        "reliability": {
            "edges": [0.0, 0.5, 1.0], "confidence": [None, 0.9], "accuracy": [None, 0.7], "count": [0, 600]
        },
        "cost": {"fit_seconds": 20.0 * nll, "predict_seconds": 1.5, "parameters": 74496, "passes": 16},
        "examples": [
            {"text": text, "label": 1, "probabilities": [0.88, 0.12], "draws": draws, "mutual_information": 0.2},
            {"text": "nothing to see", "label": 0, "probabilities": [0.6, 0.4], "draws": []},
        ],
    }  # fmt: skip


@pytest.fixture
def results() -> dict:
    means = {"MAP": 0.45, "LoRA": 0.7}
    cells = [cell(method, means[method] + 0.01 * seed, seed=seed) for method in means for seed in (0, 2)]
    cells += [cell("MAP", 0.9123, split="arc_easy"), cell("LoRA", 1.3, split="arc_easy")]
    return {
        "format": 1,
        "title": "A comparison",
        "baseline": "LoRA",
        "task": {"name": "sst2", "class_names": ["bad", "good"], "splits": {"train": 400, "test": 600, "arc_easy": 77}},
        "settings": {
            "num_draws": 16,
            "seeds": [0, 2],
            "temperature": {"LoRA": 1.0, "MAP": 0.3},
            "versions": {"torch": "2.13.0"},
            "hardware": "two cores",
            "recipe": "lora:\n  r: 8",
            "priors": {"*.A": "Normal(0.05)"},
        },
        "cells": cells,
    }


def test_the_page_is_balanced_and_self_contained(results):
    """Every tag is closed, nothing is fetched, and no script runs."""
    text = render(results)
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    for tag, attributes, _ in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img")
        assert not {"src", "href", "srcset", "xlink:href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|url\(|@import", text)


def test_the_page_can_be_read_with_any_device(results):
    """Viewport, language, both colour schemes, headings in order, captions, scopes, and names for all pictures."""
    text = render(results)
    page = Page(text)
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text and "@media print" in text
    assert ("html", {"lang": "en"}, ()) in page.tags
    levels = [int(tag[1]) for tag, _, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert page.tables and all("caption" in parts for parts in page.tables)
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes, _ in page.tags if tag == "th")
    pictures = [attributes for tag, attributes, _ in page.tags if tag == "svg"]
    assert len(pictures) >= 4 and all(picture["role"] == "img" and picture["aria-label"] for picture in pictures)
    figures = sum(tag == "figure" for tag, _, _ in page.tags)
    assert figures == sum(tag == "figcaption" for tag, _, _ in page.tags) == 3
    identifiers = [attributes["id"] for _, attributes, _ in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert {attributes["aria-labelledby"] for tag, attributes, _ in page.tags if tag == "section"} == set(identifiers)
    for tag, _, parents in page.tags:
        if tag == "table":
            assert parents[-1] == "div"


def test_the_page_contains_the_numbers(results):
    """Means, spreads, temperatures, intervals, other splits, costs and settings are all there."""
    words = " ".join(Page(render(results)).words.split())
    for expected in (
        "0.460 ± 0.014",  # NLL of MAP: mean and sd of 0.45 and 0.47
        "0.360 ± 0.014",
        "τ = 1.42",
        "0.440–0.460",  # interval of seed 0
        "0.912",
        "arc_easy, 77 examples",
        "74,496",
        "0.65 ×",
        "Posterior temperature βLoRA 1.0 · MAP 0.3 (1 is the ELBO itself)",
        "Normal(0.05)",
        "lora: r: 8",
        "torch 2.13.0",
        "two cores",
        "about MAP",
        "MAP has the lowest negative log-likelihood",
    ):
        assert expected in words, expected


def test_diagrams_pool_the_seeds(results):
    """Counts are averaged over seeds, accuracy and confidence weighted by count."""
    results["cells"][0]["reliability"] |= {"count": [0, 200], "accuracy": [None, 0.5], "confidence": [None, 0.8]}
    (told,) = re.findall(r"<title>(confidence .*?accuracy 0\.65)</title>", render(results))
    assert told == "confidence 0.50 to 1.00: 400 predictions, mean confidence 0.88, accuracy 0.65"


def test_examples_show_every_method_beside_the_true_class(results):
    """A confidently wrong text appears once, with each method's draws; a text nobody is sure about does not."""
    page = Page(render(results))
    assert page.words.count("a fine film") == 1 and "nothing to see" not in page.words
    assert "True class: good" in " ".join(page.words.split())
    bars = [attributes for tag, attributes, _ in page.tags if tag == "svg" and attributes["class"] == "draws"]
    assert [bar["aria-label"] for bar in bars] == [
        f"{method}, probability of the true class: 3 draws from 0.05 to 0.80" for method in ("LoRA", "MAP")
    ]


def test_disagreement_is_taken_from_draws_where_it_is_not_given(results):
    """Without a stored mutual information, draws that contradict one another still rank a text."""
    for one in results["cells"]:
        one["examples"] = [
            {"text": "they agree", "label": 0, "probabilities": [0.6, 0.4], "draws": [[0.6, 0.4], [0.6, 0.4]]},
            {"text": "they differ", "label": 0, "probabilities": [0.5, 0.5], "draws": [[1.0, 0.0], [0.0, 1.0]]},
        ]
    words = Page(render(results)).words
    assert "they differ" in words and "they agree" not in words


def test_texts_are_escaped(results):
    """Hostile text in any field comes out as text."""
    hostile = copy.deepcopy(results)
    hostile["title"] = hostile["baseline"] = hostile["task"]["name"] = EVIL
    hostile["task"]["class_names"] = [EVIL, EVIL]
    hostile["task"]["splits"] = {EVIL: EVIL}
    hostile["settings"] |= {"hardware": EVIL, "recipe": EVIL, "priors": {EVIL: EVIL}, "versions": {EVIL: EVIL}}
    for one in hostile["cells"]:
        one["description"] = EVIL
        one["method"] = EVIL if one["method"] == "LoRA" else one["method"]
        one["split"] = EVIL if one["split"] != "test" else "test"
        one["cost"] = {EVIL: 1.0}
        one["metrics"][EVIL] = {"value": 0.5}
        for example in one["examples"]:
            example["text"] = EVIL
    page = Page(render(hostile))
    assert not {tag for tag, _, _ in page.tags} & {"script", "img"}
    assert not any(name.startswith("on") for _, attributes, _ in page.tags for name in attributes)
    assert page.words.count('<script>alert("x")</script>') > 10


@pytest.mark.parametrize(
    "key", ["metrics", "scaling", "scaled_metrics", "reliability", "cost", "examples", "description", "seed"]
)
@pytest.mark.parametrize("missing", [None, "absent"])
def test_missing_parts_of_cells_do_not_matter(results, key, missing):
    """Any optional entry of a cell may be None or absent."""
    for one in results["cells"]:
        if missing is None:
            one[key] = None
        else:
            del one[key]
    Page(render(results))


@pytest.mark.parametrize("key", ["format", "title", "baseline", "task", "settings", "cells"])
def test_missing_parts_of_results_do_not_matter(results, key):
    """Any top-level entry may be absent; an empty dictionary gives an empty report."""
    del results[key]
    Page(render(results))
    assert "There are no results yet." in Page(render({})).words


def test_broken_numbers_are_shown_as_such(results):
    """NaN becomes a dash, infinity ∞ and a remark under the overview, and nothing says nan."""
    for value in results["cells"][0]["metrics"].values():
        value |= {"value": math.nan, "low": None, "high": math.nan}
    results["cells"][2]["metrics"]["nll"] = {"value": math.inf, "low": 0.5, "high": math.inf}
    results["cells"][0]["cost"]["fit_seconds"] = None
    results["cells"][0]["examples"][0]["probabilities"] = [math.nan, 0.1]
    results["cells"][0]["examples"][1]["label"] = 7
    words = Page(render(results)).words
    assert "∞" in words and "missing or infinite: LoRA" in words
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", words)


def test_one_seed_shows_its_interval(results):
    """With a single seed the interval stands in the place of the standard deviation."""
    results["cells"] = [one for one in results["cells"] if one["seed"] == 0]
    words = " ".join(Page(render(results)).words.split())
    assert "0.450 0.440–0.460" in words and "Only one seed" in words


def test_the_file_is_written_from_json(results, tmp_path):
    """Results that went through a JSON file give the same page, written as UTF-8; the input is not changed."""
    before = copy.deepcopy(results)
    again = json.loads(json.dumps(results))
    path = write_report(again, tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == render(results)
    assert results == before


def test_another_format_is_refused(results):
    """A results file of another format is an error that says what to do."""
    with pytest.raises(ValueError, match="format 2"):
        render(results | {"format": 2})


def test_the_picture_shows_every_method(results, tmp_path):
    """Law: the picture beside the report has a panel for each method, from the same pooled curves."""
    one = Image.open(write_picture({**results, "cells": results["cells"][:1]}, tmp_path / "one.png"))
    every = Image.open(write_picture(results, tmp_path / "all.png"))
    methods = {cell["method"] for cell in results["cells"] if cell["split"] == "test" and cell.get("reliability")}
    assert len(methods) > 1
    assert every.width > 1.5 * one.width
