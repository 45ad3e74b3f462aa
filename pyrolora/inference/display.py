"""A posterior as a notebook shows it: its sites, what is random there, what was learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pyrolora.guides.base import Guide
from pyrolora.program import PyroLoRA

_TERMS = ("elbo", "data", "kl", "log_prior")


def table(title: str, program: PyroLoRA, guide: Guide, history: Sequence[Mapping[str, Any]]) -> str:
    """HTML: one row for each site with shape, prior, whether it is random, and the guide's own numbers.

    Args:
        title: The posterior in one line.
        program: The Pyro model.
        guide: The fitted guide.
        history: The Trainer's log, of which the last objective is shown.
    """
    learnt, random = guide.describe(), set(guide.random_sites())
    cells = []
    for name, shape, numbers, prior, _ in program.sites.table():
        state = type(guide).__name__ if name in random else "point estimate"
        cells.append((name, shape, numbers, prior, state, _shown(learnt.get(name, {}))))
    for name, latent in program.latents.items():
        if name not in program.sites:
            state = type(guide).__name__ if name in random else "point estimate"
            size = " × ".join(map(str, latent.shape))
            cells.append((name, size, f"{latent.shape.numel():,}", "", state, _shown(learnt.get(name, {}))))
    head = "".join(f"<th>{word}</th>" for word in ("site", "shape", "numbers", "prior", "posterior", "learnt"))
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in cells)
    notes = [_shown(row) for name, row in learnt.items() if name not in program.latents]
    if last := next((row for row in reversed(history) if "elbo" in row), None):
        notes.append(f"last logged, in nats per training example: {_shown({term: last[term] for term in _TERMS})}")
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<p>{escape(title)}</p><table><tr>{head}</tr>{rows}</table>{below}"


def _shown(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
