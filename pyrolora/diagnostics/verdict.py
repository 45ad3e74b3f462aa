"""A finding: what one diagnostic says in plain words, how it stands, and what to do."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Level = Literal["fine", "look", "bad", "none"]

SIGNS: dict[Level, str] = {"fine": "ok", "look": "?", "bad": "!", "none": "–"}


@dataclass(frozen=True)
class Finding:
    """What one diagnostic says.

    Attributes:
        name: What was looked at.
        level: ``"fine"``; ``"look"``: not fine, or undecided; ``"bad"``; ``"none"``: it cannot be said here, and why.
        words: What was found, with its numbers.
        advice: What to do; empty where nothing is to be done.
        numbers: The numbers by name, for programs.
    """

    name: str
    level: Level
    words: str
    advice: str = ""
    numbers: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def show(findings: Iterable[Finding], *, width: int = 110) -> str:
    """Findings as lines of text: sign, name, words; the advice after an arrow."""
    findings = list(findings)
    left = max(len(f.name) for f in findings) + 5
    lines = []
    for f in findings:
        head = f"{SIGNS[f.level]:>2} {f.name}".ljust(left)
        lines += textwrap.wrap(f.words, width, initial_indent=head, subsequent_indent=" " * left)
        if f.advice:
            lines += textwrap.wrap(
                f.advice, width, initial_indent=" " * (left - 2) + "→ ", subsequent_indent=" " * left
            )
    return "\n".join(lines)
