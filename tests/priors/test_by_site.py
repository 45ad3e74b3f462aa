from __future__ import annotations

import pytest

from pyrolora.priors.base import PriorError
from pyrolora.priors.by_site import by_site
from pyrolora.priors.flat import Flat
from pyrolora.priors.normal import Normal

SITES = ["lora.query.A", "lora.query.B", "lora.value.A", "head.classifier.weight"]
FIRST, SECOND, THIRD = Normal(1.0), Normal(2.0), Flat()


def test_the_first_match_wins():
    """Law: a site gets the prior of the first pattern, in the order given, that matches its name."""
    chosen = by_site({"lora.query.*": FIRST, "*.A": SECOND, "*": THIRD}, SITES)
    assert list(chosen) == SITES
    assert list(chosen.values()) == [FIRST, FIRST, SECOND, THIRD]
    swapped = by_site({"*.A": SECOND, "lora.query.*": FIRST, "*": THIRD}, SITES)
    assert list(swapped.values()) == [SECOND, FIRST, SECOND, THIRD]


def test_an_exact_name_is_a_pattern_and_case_counts():
    """Law: patterns are shell-style, match the whole name, and tell A from a."""
    chosen = by_site({"lora.value.A": FIRST, "*.[AB]": SECOND, "head*": THIRD}, SITES)
    assert list(chosen.values()) == [SECOND, SECOND, FIRST, THIRD]
    with pytest.raises(PriorError, match=r"\*\.a match no site"):
        by_site({"*.a": FIRST, "*": SECOND}, SITES)
    with pytest.raises(PriorError, match=r"lora\.query match no site"):
        by_site({"lora.query": FIRST, "*": SECOND}, SITES)


def test_orphans_are_listed_with_the_patterns():
    """Law: sites that no pattern matches are all named, with the patterns and a way out."""
    with pytest.raises(PriorError) as caught:
        by_site({"*.A": FIRST, "lora.value.*": SECOND}, SITES)
    message = str(caught.value)
    assert "lora.query.B, head.classifier.weight" in message and "*.A, lora.value.*" in message
    assert "priors.Flat()" in message and "lora.query.A" not in message
    with pytest.raises(PriorError, match=r"Patterns, in order: none\."):
        by_site({}, SITES)


def test_idle_patterns_are_listed_with_the_sites():
    """Law: patterns that match no site (a misspelt module) are all named, with the sites there are."""
    with pytest.raises(PriorError, match=r"lora\.q_proj\.\*, lora\.v_proj\.\* match no site") as caught:
        by_site({"lora.q_proj.*": FIRST, "lora.v_proj.*": SECOND, "*": THIRD}, SITES)
    assert all(name in str(caught.value) for name in SITES)


def test_a_narrow_pattern_after_a_wide_one_is_an_error():
    """Law: a prior that an earlier, wider pattern keeps from ever being chosen is an error, not silence."""
    with pytest.raises(PriorError, match=r"'\*\.A' is never used: '\*' matches its sites first"):
        by_site({"*": THIRD, "*.A": FIRST}, SITES)


def test_a_fallback_may_be_idle():
    """Law: a last, wide pattern is welcome also where narrower ones have taken every site of this model."""
    assert by_site({"*.A": FIRST, "*.B": SECOND, "*": THIRD}, SITES[:3])["lora.value.A"] is FIRST
    assert by_site({"lora.query.A": FIRST, "*.A": SECOND}, SITES[:1]) == {"lora.query.A": FIRST}
