from __future__ import annotations

from typing import Any

import pytest

from pyrolora.construct import RecipeError, call, classes, construct, described, nearest
from pyrolora.priors.normal import Normal


def test_only_public_classes_can_be_named() -> None:
    """Law: neither base classes, nor exceptions, nor anything outside the package is among them."""
    assert {"MAP", "MeanField", "Laplace"} <= classes("guides").keys() and "Guide" not in classes("guides")
    assert (
        "PhysicalCommonsense" in classes("tasks") and not {"Task", "DataError", "DataSource"} & classes("tasks").keys()
    )
    for name in ("os.system", "builtins.eval", "pyrolora.guides.map.MAP", "__import__", "Guide"):
        with pytest.raises(RecipeError, match="x: unknown class"):
            construct(name, {}, "guides", where="x")


def test_a_name_is_a_class_without_arguments() -> None:
    """Law: ``NAME`` and the mapping with class_path and init_args say the same; other keys are refused."""
    assert described("Flat", "x") == described({"class_path": "Flat"}, "x") == ("Flat", {})
    assert described({"class_path": "Normal", "init_args": {"scale": 1.0}}, "x") == ("Normal", {"scale": 1.0})
    for spec in (3, {"init_args": {}}, {"class_path": "Normal", "scale": 1.0}):
        with pytest.raises(RecipeError, match="x: give a class name"):
            described(spec, "x")


def test_arguments_reach_the_class_by_name() -> None:
    """Law: the object has them; unknown ones are refused with the nearest that there is, and so are refused values."""
    prior = construct("Normal", {"scale": 0.3}, "priors", where="x")
    assert isinstance(prior, Normal) and prior.scale == 0.3
    with pytest.raises(RecipeError, match="x: Normal: unknown argument 'scal'; did you mean 'scale'"):
        construct("Normal", {"scal": 0.3}, "priors", where="x")
    with pytest.raises(RecipeError, match="x: Normal: "):
        construct("Normal", {"scale": -1.0}, "priors", where="x")
    with pytest.raises(RecipeError, match="arguments are a mapping, not 3"):
        call(Normal, 3, where="x")


def test_arguments_by_position_come_from_the_caller_alone() -> None:
    """Law: what is given by position cannot be given again from a file."""

    def pair(first: Any, second: Any) -> tuple[Any, Any]:
        return first, second

    assert call(pair, {"second": 2}, where="x", first=(1,)) == (1, 2)
    with pytest.raises(RecipeError, match="unknown argument 'first'"):
        call(pair, {"first": 3, "second": 2}, where="x", first=(1,))


def test_the_nearest_name_and_a_short_list() -> None:
    """Law: a near miss is named; what there is, where it is short."""
    assert nearest("Meanfield", ["MAP", "MeanField"]) == "; did you mean 'MeanField'? There are MAP, MeanField."
    assert nearest("x", ["MAP"]) == ". There are MAP." and nearest("x", []) == ". There are none."
    assert nearest("x", [f"name{i}" for i in range(41)]) == "."
