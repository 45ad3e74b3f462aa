"""What a comparison says, in numbers and in words: spreads over seeds and the sentences that open the report.

A *cell* is one method fitted with one seed and evaluated on one split. Every function forgives missing keys, None and
NaN, because a run that failed halfway should still give a readable report.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Cell = Mapping[str, Any]

_COUNTS = {2: "Two", 3: "Three", 4: "Four", 5: "Five", 6: "Six", 7: "Seven", 8: "Eight", 9: "Nine", 10: "Ten"}


@dataclass(frozen=True)
class Spread:
    """A metric of one method over its seeds.

    Mean, standard deviation (divisor n − 1), and the hull of all values and 95 % intervals. All are None without a
    single number, sd with fewer than two. Infinite values are kept.
    """

    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    count: int


def number(value: Any) -> float | None:
    """The value as a float; None where it is missing, NaN or not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def show(value: Any, *, digits: int = 3) -> str:
    """A number for a person: fixed decimals, ∞ for infinity, a dash where there is none."""
    found = number(value)
    if found is None:
        return "–"
    if math.isinf(found):
        return "∞" if found > 0 else "−∞"
    return f"{found:.{digits}f}".replace("-", "−")


def spread_of(cells: Iterable[Cell], metric: str, *, scaled: bool = False) -> Spread:
    """The spread of one metric over cells, as fitted or after temperature scaling."""
    values: list[float] = []
    ends: list[float] = []
    for cell in cells:
        entry = (cell.get("scaled_metrics" if scaled else "metrics") or {}).get(metric) or {}
        value = number(entry.get("value"))
        if value is None:
            continue
        values.append(value)
        ends += [end for end in (value, number(entry.get("low")), number(entry.get("high"))) if end is not None]
    if not values:
        return Spread(None, None, None, None, 0)
    sd = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    return Spread(math.fsum(values) / len(values), sd, min(ends), max(ends), len(values))


def by_method(results: Mapping[str, Any], split: str) -> dict[str, list[Cell]]:
    """The cells of one split, grouped by method: the baseline first, the others as they appear."""
    groups: dict[str, list[Cell]] = {}
    for cell in results.get("cells") or []:
        if cell.get("split") == split:
            groups.setdefault(str(cell.get("method")), []).append(cell)
    baseline = str(results.get("baseline"))
    return {name: groups[name] for name in sorted(groups, key=lambda name: name != baseline)}


def reported_split(results: Mapping[str, Any]) -> str:
    """The split that the report is about: "test", or the first that occurs."""
    splits = [str(cell.get("split")) for cell in results.get("cells") or []]
    return "test" if "test" in splits or not splits else splits[0]


def apart(first: Spread, second: Spread) -> bool:
    """Whether the intervals of all seeds of one lie on one side of all those of the other.

    Stricter than a paired test, since both methods saw the same examples: "no" means undecided, not equal.
    """
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return False
    return first.high < second.low or second.high < first.low


def best(
    groups: Mapping[str, Sequence[Cell]], metric: str, *, scaled: bool = False, highest: bool = False
) -> str | None:
    """The method with the best finite mean, or None if no method has one."""
    means = {name: spread_of(cells, metric, scaled=scaled).mean for name, cells in groups.items()}
    known = {name: mean for name, mean in means.items() if mean is not None and math.isfinite(mean)}
    if not known:
        return None
    return (max if highest else min)(known, key=lambda name: known[name])


def sentences(results: Mapping[str, Any]) -> list[str]:
    """The summary, sentence by sentence, made from the numbers alone; it says where they decide nothing."""
    groups = by_method(results, reported_split(results))
    if not groups:
        return ["There are no results yet."]
    baseline = str(results.get("baseline"))
    said = [_opening(results, groups)]
    winner = best(groups, "nll")
    if winner is None:
        return [*said, "No method has a finite negative log-likelihood."]
    spreads = {name: spread_of(cells, "nll") for name, cells in groups.items()}
    lowest = f"{winner} has the lowest negative log-likelihood (NLL), {show(spreads[winner].mean)} nats per example"
    if winner != baseline and baseline in groups:
        verdict = _verdict(groups, "nll", winner, baseline)
        said.append(f"{lowest} against {show(spreads[baseline].mean)} for {baseline}; {verdict}.")
        said += [
            _against(groups, metric, words, winner, baseline)
            for metric, words in (("ece", "ECE"), ("accuracy", "accuracy"))
        ]
    else:
        said.append(f"{lowest}.")
    rivals = [name for name in groups if name not in (winner, baseline) and not apart(spreads[winner], spreads[name])]
    if winner == baseline:
        undecided = [name for name in groups if name != winner and not apart(spreads[winner], spreads[name])]
        if undecided:
            said.append(f"The NLL intervals do not separate it from {_listing(undecided)}.")
    elif rivals:
        said.append(f"The NLL intervals do not separate {winner} from {_listing(rivals)}.")
    said += _calibrated(groups, winner)
    said += _scaling(groups, winner, baseline)
    if max(spread.count for spread in spreads.values()) < 2:
        said.append("Only one seed was run, so how much a repetition would change these numbers is unknown.")
    return [sentence for sentence in said if sentence]


def _opening(results: Mapping[str, Any], groups: Mapping[str, Sequence[Cell]]) -> str:
    split, task = reported_split(results), results.get("task") or {}
    size = (task.get("splits") or {}).get(split)
    examples = f"{size} {split} examples" if size else f"the {split} split"
    name = f" of {task['name']}" if task.get("name") else ""
    count = _COUNTS.get(len(groups), str(len(groups)))
    methods = f"{count} methods were" if len(groups) > 1 else f"{next(iter(groups))} was"
    runs = max(len(cells) for cells in groups.values())
    return f"{methods} evaluated on {examples}{name}, {'once' if runs == 1 else f'with {runs} seeds'}."


def _against(groups: Mapping[str, Sequence[Cell]], metric: str, words: str, name: str, other: str) -> str:
    ours, theirs = spread_of(groups[name], metric), spread_of(groups[other], metric)
    if ours.mean is None or theirs.mean is None:
        return ""
    return f"Its {words} is {show(ours.mean)} against {show(theirs.mean)}; {_verdict(groups, metric, name, other)}."


def _verdict(groups: Mapping[str, Sequence[Cell]], metric: str, name: str, other: str) -> str:
    separate = apart(spread_of(groups[name], metric), spread_of(groups[other], metric))
    return "the 95 % intervals do not overlap" if separate else "the 95 % intervals overlap, so this is undecided"


def _calibrated(groups: Mapping[str, Sequence[Cell]], winner: str) -> list[str]:
    lowest = best(groups, "ece")
    if lowest is None or lowest == winner:
        return []
    ours, theirs = spread_of(groups[lowest], "ece"), spread_of(groups[winner], "ece")
    verdict = "" if apart(ours, theirs) else ", a difference within the intervals"
    return [f"The lowest ECE is that of {lowest}, {show(ours.mean)}{verdict}."]


def _scaling(groups: Mapping[str, Sequence[Cell]], winner: str, baseline: str) -> list[str]:
    scaled_winner = best(groups, "nll", scaled=True)
    if scaled_winner is None:
        return []
    said = []
    control = spread_of(groups.get(baseline, []), "nll", scaled=True)
    ours = spread_of(groups[winner], "nll")
    if winner != baseline and control.mean is not None and ours.mean is not None:
        if not apart(ours, control):
            verdict = f"which the intervals do not separate from {winner} as fitted"
        elif control.mean < ours.mean:
            verdict = f"better than {winner} as fitted"
        else:
            verdict = f"still behind {winner} as fitted"
        said.append(f"Temperature scaling alone brings {baseline} to an NLL of {show(control.mean)}, {verdict}.")
    mean = spread_of(groups[scaled_winner], "nll", scaled=True).mean
    said.append(f"With every method scaled, {scaled_winner} is lowest at {show(mean)}.")
    return said


def _listing(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
