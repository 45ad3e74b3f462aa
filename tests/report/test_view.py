from __future__ import annotations

from pyrolora.report.view import View, mean
from tests.report.samples import cell, results


def test_the_baseline_is_grey_and_the_others_differ() -> None:
    """Law: every method of any split has a colour; of up to seven beside the baseline no two look the same."""
    cells = [cell(f"m{i}", 0.5) for i in range(7)] + [cell("LoRA", 0.5)]
    view = View.of({"baseline": "LoRA", "cells": cells})
    assert view.colour("LoRA") == "var(--baseline)" and next(iter(view.groups)) == "LoRA"
    assert len(set(view.styles.values())) == 8 and len({view.colour(name) for name in view.groups}) == 8
    assert View.of({}).groups == {} and View.of({}).class_names == []


def test_facts_say_what_numbers_are_of() -> None:
    """Law: split, number of examples, support, seeds, and for each method whether passes, draws or points."""
    made = results()
    assert View.of(made).facts() == (
        "Split “test”: 600 examples, 2 classes (bad, good), 2 seeds; LoRA: one pass; MeanField: 16 draws."
    )
    assert (
        View.of(made, "arc_easy").facts(draws=False) == "Split “arc_easy”: 77 examples, 2 classes (bad, good), 1 seed."
    )
    for one in made["cells"]:
        one["joint_draws"] = one["method"] == "LoRA"
    view = View.of(made)
    assert "MeanField: 16 quasi-Monte Carlo points an example" in view.facts()
    assert view.pointwise == ["MeanField"]
    made["task"]["class_names"] = [f"class{i}" for i in range(77)]
    assert "77 classes (class0, class1, class2, class3, class4, …)" in View.of(made).facts()


def test_other_splits() -> None:
    """Law: shifts are the other splits that have cells, in order."""
    view = View.of(results())
    assert view.split == "test" and view.shifts == ["arc_easy"]
    assert View.of(results(), "arc_easy").shifts == ["test"]


def test_means_forgive() -> None:
    """Law: None and NaN do not count; nothing has no mean."""
    assert mean([1, None, float("nan"), 3.0]) == 2.0
    assert mean([None]) is None and mean([]) is None
