"""The report's examples: texts, what every method says of them, and the probabilities of each draw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from pyrolora.report.plots import draws_svg
from pyrolora.report.summary import number, show
from pyrolora.report.view import View

TEXT_LIMIT = 600
KINDS = {
    "wrong": (
        "Confidently wrong",
        "The texts on which some method is surest of a wrong class, with a probability of 0.7 or more.",
    ),
    "methods": (
        "Where the methods disagree",
        "The texts on which the methods’ predictives differ most: the mutual information of label and method.",
    ),
    "draws": (
        "Where the draws disagree",
        "The texts with the largest mutual information between label and adapters, under any method.",
    ),
}


def groups(view: View) -> list[dict[str, Any]]:
    """The examples by kind: heading, explanation, cards."""
    found = []
    for kind, (title, note) in KINDS.items():
        cards = [_card(view, each) for each in view.results.get("examples") or [] if each.get("kind") == kind]
        if shown := [card for card in cards if card["says"]]:
            found.append({"kind": kind, "title": title, "note": note, "cards": shown})
    return found


def _card(view: View, example: Mapping[str, Any]) -> dict[str, Any]:
    text, label = str(example.get("text")), example.get("label")
    says: list[dict[str, Any]] = []
    for method, said in (example.get("says") or {}).items():
        probabilities = [number(p) for p in (said or {}).get("probabilities") or []]
        known = isinstance(label, int) and 0 <= label < len(probabilities) and None not in probabilities
        if known and method in view.styles:
            says.append(_say(view, str(method), said, label))
    return {
        "text": text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + " …",
        "label": _class_name(view, label) if isinstance(label, int) else "unknown",
        "score": _score(example),
        "says": says,
    }


def _score(example: Mapping[str, Any]) -> str:
    """Why the text was chosen, in a number."""
    value = number(example.get("score"))
    if value is None:
        return ""
    if example.get("kind") == "wrong":
        return f"highest confidence in a wrong class {show(value, digits=2)}"
    return f"mutual information {show(value, digits=4)} nats"


def _say(view: View, method: str, said: Mapping[str, Any], label: Any) -> dict[str, Any]:
    probabilities = said["probabilities"]
    top = max(range(len(probabilities)), key=probabilities.__getitem__)
    draws = [draw[label] for draw in said.get("draws") or []] or [probabilities[label]]
    known = [draw for draw in draws if number(draw) is not None and math.isfinite(draw)]
    spread = f"{min(known):.2f} to {max(known):.2f}" if len(known) > 1 else ""
    return {
        "method": method,
        "colour": view.colour(method),
        "right": top == label,
        "top": _class_name(view, top),
        "confidence": show(probabilities[top], digits=2),
        "probability": show(probabilities[label], digits=2),
        "draws": Markup(draws_svg(draws, label=f"{method}, probability of the true class")),
        "spread": spread,
    }


def _class_name(view: View, label: int) -> str:
    return view.class_names[label] if label < len(view.class_names) else f"class {label}"
