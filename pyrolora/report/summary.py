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
Groups = Mapping[str, Sequence[Cell]]

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
    shown = f"{found:.{digits}f}".replace("-", "−")
    return shown if shown.strip("−0.") else shown.lstrip("−")  # no −0.000


def signed(value: Any, *, digits: int = 3) -> str:
    """A difference for a person: as `show`, with a plus where it is above zero."""
    shown = show(value, digits=digits)
    return f"+{shown}" if shown.strip("0.")[:1].isdigit() or shown == "∞" else shown


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


def best(groups: Groups, metric: str, *, scaled: bool = False, highest: bool = False) -> str | None:
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
        verdict = _verdict(results, groups, "nll", winner, baseline)
        said.append(f"{lowest} against {show(spreads[baseline].mean)} for {baseline}; {verdict}.")
        said += [
            _against(results, groups, metric, words, winner, baseline)
            for metric, words in (("ece", "ECE"), ("accuracy", "accuracy"))
        ]
    else:
        said.append(f"{lowest}.")
    rivals = [name for name in groups if name not in (winner, baseline) and not apart(spreads[winner], spreads[name])]
    if winner == baseline:
        undecided = [name for name in groups if name != winner and not _real(results, groups, "nll", name, baseline)]
        if undecided:
            said.append(f"Its NLL is not really different from that of {_listing(undecided)}.")
    elif rivals:
        said.append(f"The NLL intervals do not separate {winner} from {_listing(rivals)}.")
    said += _calibrated(groups, winner)
    said += _scaling(results, groups, winner, baseline)
    said += _averaging(groups)
    said += _elsewhere(groups)
    if max(spread.count for spread in spreads.values()) < 2:
        said.append("Only one seed was run, so how much a repetition would change these numbers is unknown.")
    if failed := results.get("failed"):
        said.append(f"Not in this report, because they failed: {_listing(list(failed))}.")
    return [sentence for sentence in said if sentence]


def _opening(results: Mapping[str, Any], groups: Groups) -> str:
    split, task = reported_split(results), results.get("task") or {}
    size = (task.get("splits") or {}).get(split)
    examples = f"{size} {split} examples" if size else f"the {split} split"
    name = f" of {task['name']}" if task.get("name") else ""
    count = _COUNTS.get(len(groups), str(len(groups)))
    methods = f"{count} methods were" if len(groups) > 1 else f"{next(iter(groups))} was"
    runs = max(len(cells) for cells in groups.values())
    return f"{methods} evaluated on {examples}{name}, {'once' if runs == 1 else f'with {runs} seeds'}."


def _against(results: Mapping[str, Any], groups: Groups, metric: str, words: str, name: str, other: str) -> str:
    ours, theirs = spread_of(groups[name], metric), spread_of(groups[other], metric)
    if ours.mean is None or theirs.mean is None:
        return ""
    verdict = _verdict(results, groups, metric, name, other)
    return f"Its {words} is {show(ours.mean)} against {show(theirs.mean)}; {verdict}."


def _contrast(results: Mapping[str, Any], metric: str, name: str, *, scaled: bool = False) -> Mapping[str, Any] | None:
    """The difference of a method, as fitted, from the baseline, as fitted or scaled; None where none was taken."""
    for each in results.get("contrasts") or []:
        same = each.get("method") == name and each.get("split") == reported_split(results)
        if same and not each.get("scaled") and bool(each.get("baseline_scaled")) == scaled:
            found = (each.get("metrics") or {}).get(metric) or {}
            return found if number(found.get("low")) is not None else None
    return None


def _real(results: Mapping[str, Any], groups: Groups, metric: str, name: str, baseline: str) -> bool:
    """Whether a method really differs from the baseline: by the interval of the difference, else by two intervals."""
    found = _contrast(results, metric, name)
    if found is not None:
        return bool(found.get("real"))
    return apart(spread_of(groups[name], metric), spread_of(groups[baseline], metric))


def _verdict(results: Mapping[str, Any], groups: Groups, metric: str, name: str, other: str) -> str:
    found = _contrast(results, metric, name)
    if found is not None:
        ends = f"{signed(found['low'])} to {signed(found['high'])}"
        kind = "real" if found.get("real") else "undecided"
        return f"the difference is {kind} (95 % interval {ends})"
    separate = apart(spread_of(groups[name], metric), spread_of(groups[other], metric))
    return "the 95 % intervals do not overlap" if separate else "the 95 % intervals overlap, so this is undecided"


def _calibrated(groups: Groups, winner: str) -> list[str]:
    lowest = best(groups, "ece")
    if lowest is None or lowest == winner:
        return []
    ours, theirs = spread_of(groups[lowest], "ece"), spread_of(groups[winner], "ece")
    verdict = "" if apart(ours, theirs) else ", a difference within the intervals"
    return [f"The lowest ECE is that of {lowest}, {show(ours.mean)}{verdict}."]


def _scaling(results: Mapping[str, Any], groups: Groups, winner: str, baseline: str) -> list[str]:
    scaled_winner = best(groups, "nll", scaled=True)
    if scaled_winner is None:
        return []
    said = []
    control = spread_of(groups.get(baseline, []), "nll", scaled=True)
    ours = spread_of(groups[winner], "nll")
    if winner != baseline and control.mean is not None and ours.mean is not None:
        found = _contrast(results, "nll", winner, scaled=True)
        if not (apart(ours, control) if found is None else found.get("real")):
            verdict = f"which is not really different from {winner} as fitted"
        elif control.mean < ours.mean:
            verdict = f"better than {winner} as fitted"
        else:
            verdict = f"still behind {winner} as fitted"
        said.append(f"Temperature scaling alone brings {baseline} to an NLL of {show(control.mean)}, {verdict}.")
    mean = spread_of(groups[scaled_winner], "nll", scaled=True).mean
    said.append(f"With every method scaled, {scaled_winner} is lowest at {show(mean)}.")
    return said


def _averaging(groups: Groups) -> list[str]:
    """Whether averaging over draws does anything, method by method."""
    idle, moved = [], []
    for name, cells in groups.items():
        known = [cell["averaging"] for cell in cells if cell.get("averaging")]
        before = [number(each.get("mean_weights")) for each in known]
        start = [value for value in before if value is not None]
        if not start:
            continue
        if any((each.get("gain") or {}).get("real") for each in known):
            now = spread_of(cells, "nll").mean
            moved.append(f"that of {name} from {show(math.fsum(start) / len(start))} to {show(now)}")
        else:
            idle.append(name)
    said = []
    if moved:
        said.append(f"Averaging over draws, against mean weights alone, changes the NLL: {_listing(moved)}.")
    if idle:
        said.append(f"For {_listing(idle)} averaging changes nothing that these examples show: the noise does nothing.")
    return said


def _elsewhere(groups: Groups) -> list[str]:
    """How well the best score tells each other split apart."""
    best_by_split: dict[str, tuple[float, str]] = {}
    for name, cells in groups.items():
        for split in dict.fromkeys(split for cell in cells for split in cell.get("ood") or {}):
            for score in ("max_probability", "entropy", "mutual_information"):
                entries = [((cell.get("ood") or {}).get(split) or {}).get("scores") or {} for cell in cells]
                area = spread_of([{"metrics": each.get(score)} for each in entries], "auroc").mean
                found = (area if area is not None else -1.0, f"{name}, by {score.replace('_', ' ')}")
                best_by_split[split] = max(best_by_split.get(split, (-1.0, "")), found)
    said = []
    for split, (area, who) in best_by_split.items():
        best_of = f"an AUROC of at most {show(area, digits=2)} ({who})"
        if area >= 0.5:
            said.append(f"Uncertainty tells {split} apart with {best_of}; 0.5 is chance.")
        elif area >= 0:
            said.append(f"No method is less sure of {split} than of the rest: {best_of}, where 0.5 is chance.")
    return said


def _listing(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
