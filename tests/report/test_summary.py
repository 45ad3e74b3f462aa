from __future__ import annotations

import math
import statistics

import pytest

from pyrolora.report import summary


def cell(
    method: str,
    nll: float | None,
    *,
    half: float = 0.01,
    seed: int = 0,
    split: str = "test",
    scaled: float | None = None,
):
    """A cell whose four metrics follow the NLL, with symmetric intervals."""

    def metrics(value):
        return {
            name: {"value": value * factor, "low": (value - half) * factor, "high": (value + half) * factor}
            for name, factor in (("nll", 1.0), ("ece", 0.1), ("accuracy", 0.5), ("brier", 0.7))
        }

    return {
        "method": method,
        "seed": seed,
        "split": split,
        "metrics": metrics(nll) if nll is not None else None,
        "scaled_metrics": metrics(scaled) if scaled is not None else None,
    }


def results(*cells) -> dict:
    return {"baseline": "LoRA", "task": {"name": "sst2", "splits": {"test": 600}}, "cells": list(cells)}


def told(*cells) -> str:
    return " ".join(summary.sentences(results(*cells)))


def test_spreads_are_mean_standard_deviation_and_hull():
    """Mean and n − 1 standard deviation over seeds; the hull holds every value and interval end."""
    cells = [cell("a", value, half=0.1, seed=seed) for seed, value in enumerate((0.5, 0.7, 0.9))]
    found = summary.spread_of(cells, "nll")
    assert (found.mean, found.sd) == pytest.approx((0.7, statistics.stdev([0.5, 0.7, 0.9])))
    assert (found.low, found.high, found.count) == pytest.approx((0.4, 1.0, 3))


def test_missing_numbers_are_left_out():
    """None, NaN and absent metrics do not count; infinity does."""
    broken = {"method": "a", "metrics": {"nll": {"value": math.nan}, "ece": {"value": math.inf, "low": None}}}
    assert summary.spread_of([broken, {}, cell("a", None)], "nll") == summary.Spread(None, None, None, None, 0)
    assert summary.spread_of([broken, cell("a", 0.5)], "nll").mean == 0.5
    assert summary.spread_of([broken, cell("a", 0.5)], "ece").mean == math.inf
    assert summary.spread_of([broken, cell("a", 0.5)], "ece").sd is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (None, "–"),
        (math.nan, "–"),
        ("x", "–"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (-1, "−1.000"),
        (-0.0004, "0.000"),
    ],
)
def test_numbers_are_shown_for_people(value, text):
    """Three decimals, a true minus, a dash for nothing, no minus before zero."""
    assert summary.show(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1234, "+0.123"),
        (-0.5, "−0.500"),
        (0.0, "0.000"),
        (2e-4, "0.000"),
        (12.0, "+12.000"),
        (None, "–"),
        (math.inf, "+∞"),
    ],
)
def test_differences_have_signs(value, text):
    """A plus above zero, a minus below, neither at what is shown as zero."""
    assert summary.signed(value) == text


def test_groups_put_the_baseline_first():
    """Cells of one split by method, baseline first, the rest in order of appearance."""
    cells = [cell("b", 1), cell("a", 1), cell("LoRA", 1), cell("b", 1, seed=1), cell("c", 1, split="shifted")]
    groups = summary.by_method(results(*cells), "test")
    assert list(groups) == ["LoRA", "b", "a"] and len(groups["b"]) == 2
    assert summary.reported_split(results(*cells)) == "test"
    assert summary.reported_split(results(cells[-1])) == "shifted"


def test_a_clear_difference_is_stated():
    """Disjoint intervals are said not to overlap, with both numbers."""
    words = told(cell("LoRA", 0.7), cell("Inducing", 0.4))
    assert words.startswith("Two methods were evaluated on 600 test examples of sst2, once.")
    assert (
        "Inducing has the lowest negative log-likelihood (NLL), 0.400 nats per example against 0.700 for LoRA" in words
    )
    assert "the 95 % intervals do not overlap" in words and "undecided" not in words
    assert "Only one seed" in words


def test_an_unclear_difference_is_called_undecided():
    """Overlapping intervals in any seed make the difference undecided."""
    words = told(
        cell("LoRA", 0.70), cell("LoRA", 0.48, seed=1), cell("Inducing", 0.49, seed=0), cell("Inducing", 0.4, seed=1)
    )
    assert "overlap, so this is undecided" in words and "do not overlap" not in words
    assert "Only one seed" not in words and "with 2 seeds" in words


def test_a_winning_baseline_is_not_hidden():
    """If plain LoRA is best, that is what the summary says, and who cannot be told from it."""
    words = told(cell("LoRA", 0.4), cell("MAP", 0.41), cell("Inducing", 0.6))
    assert "LoRA has the lowest negative log-likelihood" in words
    assert "not really different from that of MAP." in words and "Inducing" not in words.split("really")[1]


def test_rivals_of_the_winner_are_named():
    """Methods whose intervals overlap the winner's are listed."""
    words = told(cell("LoRA", 0.7), cell("MAP", 0.41), cell("Laplace", 0.405), cell("Inducing", 0.4), cell("SWAG", 0.5))
    assert "do not separate Inducing from MAP and Laplace." in words


@pytest.mark.parametrize(
    ("scaled", "verdict"),
    [
        (0.3, "better than Inducing as fitted"),
        (0.5, "still behind Inducing as fitted"),
        (0.405, "not really different from Inducing"),
    ],
)
def test_temperature_scaling_of_the_baseline_is_a_control(scaled, verdict):
    """The scaled baseline is compared with the winner, whichever way it goes."""
    words = told(cell("LoRA", 0.7, scaled=scaled), cell("Inducing", 0.4, scaled=0.39))
    assert f"Temperature scaling alone brings LoRA to an NLL of {scaled:.3f}" in words and verdict in words
    assert f"{'LoRA' if scaled < 0.39 else 'Inducing'} is lowest" in words


def test_nothing_to_say_is_said():
    """No cells, or no finite NLL, give a sentence and no error."""
    assert summary.sentences({}) == ["There are no results yet."]
    assert "No method has a finite" in told(cell("LoRA", math.inf), cell("MAP", None))
    assert "MAP has the lowest" in told(cell("LoRA", None), cell("MAP", 0.5))


def contrast(method: str, *, real: bool, scaled: bool = False) -> dict:
    """A difference from the baseline in every metric, −0.3 [−0.4, −0.2] or −0.3 [−0.7, 0.1]."""
    low, high = (-0.4, -0.2) if real else (-0.7, 0.1)
    found = {name: {"value": -0.3, "low": low, "high": high, "real": real} for name in ("nll", "ece", "accuracy")}
    about = {"split": "test", "method": method, "scaled": False, "baseline": "LoRA", "baseline_scaled": scaled}
    return {**about, "metrics": found}


@pytest.mark.parametrize("real", [True, False])
def test_paired_differences_decide_where_there_are_some(real):
    """The interval of the difference is the verdict, whatever two overlapping intervals say."""
    cells = [cell("LoRA", 0.7, half=0.5, scaled=0.5), cell("Inducing", 0.4, half=0.5, scaled=0.4)]
    contrasts = [contrast("Inducing", real=real), contrast("Inducing", real=real, scaled=True)]
    words = " ".join(summary.sentences(results(*cells) | {"contrasts": contrasts}))
    kind = "real (95 % interval −0.400 to −0.200)" if real else "undecided (95 % interval −0.700 to +0.100)"
    assert words.count(f"the difference is {kind}") == 3 and "overlap" not in words
    assert ("still behind Inducing as fitted" in words) == real
    assert ("not really different from Inducing as fitted" in words) != real


def test_noise_that_does_nothing_is_called_that():
    """Methods whose NLL is that of their mean weights are named, and those whose is not with both numbers."""

    def averaged(method, nll, start, real):
        return cell(method, nll) | {"averaging": {"mean_weights": start, "gain": {"real": real}}}

    words = told(cell("LoRA", 0.7), averaged("MeanField", 0.5, 0.8, True), averaged("Tiny", 0.7, 0.7, False))
    assert "changes the NLL: that of MeanField from 0.800 to 0.500." in words
    assert "For Tiny averaging changes nothing that these examples show: the noise does nothing." in words


def test_the_best_detector_of_each_split_is_named():
    """The highest AUROC of any method and score, for each other split; chance stands beside it."""

    def detecting(method, area):
        scores = {"entropy": {"auroc": {"value": 0.6}}, "mutual_information": {"auroc": {"value": area}}}
        return cell(method, 0.5) | {"ood": {"far": {"scores": scores}}}

    lower = told(detecting("LoRA", 0.3) | {"ood": {"far": {"scores": {"entropy": {"auroc": {"value": 0.4}}}}}})
    assert "No method is less sure of far than of the rest: an AUROC of at most 0.40 (LoRA, by entropy)" in lower
    words = told(detecting("LoRA", 0.55), detecting("MeanField", 0.7))
    assert "tells far apart with an AUROC of at most 0.70 (MeanField, by mutual information); 0.5 is chance." in words
