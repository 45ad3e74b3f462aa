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
from tests.report import samples

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


@pytest.fixture
def results() -> dict:
    return samples.results()


def test_the_page_is_balanced_and_self_contained(results):
    """Every tag is closed, nothing is fetched, and no script runs."""
    text = render(results)
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    for tag, attributes, _ in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img")
        assert not {"src", "srcset", "xlink:href"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
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
    pictures = [attributes for tag, attributes, _ in page.tags if tag == "svg" and "aria-hidden" not in attributes]
    assert len(pictures) >= 15 and all(picture["role"] == "img" and picture["aria-label"] for picture in pictures)
    figures = sum(tag == "figure" for tag, _, _ in page.tags)
    assert figures == sum(tag == "figcaption" for tag, _, _ in page.tags) >= 15
    identifiers = [attributes["id"] for _, attributes, _ in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers)) == 12
    assert {attributes["aria-labelledby"] for tag, attributes, _ in page.tags if tag == "section"} == set(identifiers)
    assert [attributes["href"] for tag, attributes, _ in page.tags if tag == "a"] == [f"#{i}" for i in identifiers]
    for tag, _, parents in page.tags:
        if tag == "table":
            assert parents[-1] == "div"


def test_the_page_contains_the_numbers(results):
    """Means, spreads, temperatures, intervals, other splits, costs and settings are all there."""
    words = " ".join(Page(render(results)).words.split())
    for expected in (
        "0.460 ± 0.014",  # NLL of MeanField: mean and sd of 0.45 and 0.47
        "0.360 ± 0.014",
        "τ = 1.42",
        "0.440–0.460",  # interval of seed 0
        "0.912",
        "Split “arc_easy”: 77 examples",
        "Split “test”: 600 examples, 2 classes (bad, good), 2 seeds; LoRA: one pass; MeanField: 16 draws.",
        "−0.250 −0.300 to −0.200 better",
        "−0.020 −0.070 to +0.030 undecided",
        "0.0500 ± 0.0021",  # epistemic, Monte Carlo error of the mean over seeds
        "−0.200; real in 2 of 2 fits",
        "Telling arc_easy apart (77 examples)",
        "c0ffee, in which the file is different",
        "74,496",
        "0.65 ×",
        "Posterior temperature βLoRA 1.0 · MeanField 0.3 (1 is the ELBO itself)",
        "Normal(0.05)",
        "lora: r: 8",
        "torch 2.13.0",
        "two cores",
        "about MeanField",
        "MeanField has the lowest negative log-likelihood",
    ):
        assert expected in words, expected


def test_texts_are_escaped(results):
    """Hostile text in any field comes out as text."""
    hostile = copy.deepcopy(results)
    hostile["title"] = hostile["baseline"] = hostile["task"]["name"] = EVIL
    hostile["task"]["class_names"] = [EVIL, EVIL]
    hostile["task"]["splits"] = {EVIL: EVIL}
    hostile["settings"] |= {"hardware": EVIL, "versions": {EVIL: EVIL}, "temperature": {EVIL: EVIL}}
    (recipe,) = hostile["settings"]["recipes"]
    recipe |= {"name": EVIL, "file": EVIL, "sha256": EVIL, "text": EVIL, "priors": {EVIL: EVIL}}
    recipe["git"]["commit"] = EVIL
    for one in [*hostile["cells"], *hostile["contrasts"], *hostile["heatmaps"]]:
        one["method"] = EVIL if one["method"] == "LoRA" else one["method"]
    for one in hostile["cells"]:
        one["description"] = EVIL
        one["split"] = EVIL if one["split"] != "test" else "test"
        one["cost"] = {EVIL: 1.0}
        one["metrics"][EVIL] = {"value": 0.5}
        for found in list(one["ood"].values()):
            one["ood"] = {EVIL: found | {"scores": {EVIL: {}}}}
    for example in hostile["examples"]:
        example["text"] = EVIL
        example["says"][EVIL] = example["says"].pop("LoRA")
    hostile["heatmaps"][0] |= {"title": EVIL, "unit": EVIL, "values": {EVIL: {EVIL: 1.0}}}
    page = Page(render(hostile))
    assert not {tag for tag, _, _ in page.tags} & {"script", "img"}
    assert not any(name.startswith("on") for _, attributes, _ in page.tags for name in attributes)
    assert page.words.count('<script>alert("x")</script>') > 10


@pytest.mark.parametrize(
    "key",
    [
        "metrics",
        "scaling",
        "scaled_metrics",
        "reliability",
        "risk_coverage",
        "uncertainty",
        "averaging",
        "ood",
        "num_draws",
        "joint_draws",
        "cost",
        "description",
        "seed",
    ],
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


@pytest.mark.parametrize(
    "key", ["format", "title", "baseline", "task", "settings", "cells", "contrasts", "examples", "heatmaps"]
)
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
    for found in (results["contrasts"][1]["metrics"]["nll"], results["cells"][0]["averaging"]["gain"]):
        found |= {"value": math.nan, "low": None, "high": math.nan}
    results["cells"][0]["averaging"]["mean_weights"] = None
    results["cells"][0]["averaging"]["by_draws"]["nll"] = [None, math.inf]
    results["cells"][0]["risk_coverage"]["risk"] = [math.nan, None]
    for part in results["cells"][0]["uncertainty"].values():
        part |= {"value": None, "monte_carlo_error": math.nan}
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
    with pytest.raises(ValueError, match="format 1"):
        render(results | {"format": 1})


def test_the_picture_shows_every_method(results, tmp_path):
    """Law: the picture beside the report has a panel for each method, from the same pooled curves."""
    one = Image.open(write_picture({**results, "cells": results["cells"][:1]}, tmp_path / "one.png"))
    every = Image.open(write_picture(results, tmp_path / "all.png"))
    methods = {cell["method"] for cell in results["cells"] if cell["split"] == "test" and cell.get("reliability")}
    assert len(methods) > 1
    assert every.width > 1.5 * one.width
