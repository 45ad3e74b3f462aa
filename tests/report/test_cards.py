from __future__ import annotations

import math

import pytest

from pyrolora.report import cards
from pyrolora.report.view import View
from tests.report.samples import DRAWS, example, results


def test_examples_show_every_method_beside_the_true_class() -> None:
    """Law: kinds with texts appear in order, each text once, with what each method says and its draws."""
    wrong, draws = cards.groups(View.of(results()))
    assert (wrong["kind"], draws["kind"]) == ("wrong", "draws")
    (card,) = wrong["cards"]
    assert card["text"] == "a fine film" and card["label"] == "good"
    assert card["score"] == "highest confidence in a wrong class 0.12"
    assert draws["cards"][0]["score"] == "mutual information 0.1234 nats"
    lora, field = card["says"]
    assert (lora["method"], lora["right"], lora["top"], lora["spread"]) == ("LoRA", False, "bad", "")
    assert (field["probability"], field["confidence"], field["spread"]) == ("0.12", "0.88", "0.05 to 0.80")
    assert "probability of the true class: 3 draws from 0.05 to 0.80" in field["draws"]
    assert len(DRAWS) == field["draws"].count("<rect") - 1


@pytest.mark.parametrize(
    "broken", [{"says": None}, {"says": {"gone": {}}}, {"label": 7}, {"label": None}, {"text": None, "says": {}}]
)
def test_what_is_broken_is_left_out(broken: dict) -> None:
    """Law: an example without a known label or a known method's numbers is not shown, and breaks nothing."""
    made = results() | {"examples": [example("wrong", "x") | broken]}
    assert cards.groups(View.of(made)) == []


def test_numbers_that_are_none() -> None:
    """Law: a method with a missing probability is left out of the card; draws that are NaN do not count."""
    one = example("wrong", "x" * 700) | {"score": None}
    one["says"]["LoRA"]["probabilities"] = [math.nan, 0.1]
    one["says"]["MeanField"]["draws"] = [[0.5, 0.5], [math.nan, math.nan], [0.3, 0.7]]
    ((card,),) = (group["cards"] for group in cards.groups(View.of(results() | {"examples": [one]})))
    assert [say["method"] for say in card["says"]] == ["MeanField"]
    assert card["says"][0]["spread"] == "0.50 to 0.70"
    assert card["score"] == "" and len(card["text"]) == 602 and card["text"].endswith(" …")
