"""All benchmarks in one command: each writes its JSON, and table.md sums them up beside what each is allowed.

Run: make benchmark
     python tests/benchmarks/benchmark.py --output runs/benchmark --only step store
     python tests/benchmarks/benchmark.py --table-only

Times are ratios within interleaved rounds of one run; see the scripts for what each measures. The peers of Laplace are
those of the extra `benchmark`, which `make benchmark` installs; what is not installed is said, and left out of the
table. On two cores all of it takes about half an hour.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

Row = tuple[str, str, str]
"""What was measured, its value, what it is allowed."""


@dataclass(frozen=True)
class Part:
    """A benchmark of the suite.

    Attributes:
        script: Its file, without ending.
        arguments: For it.
        title: Of its rows.
        rows: From its JSON.
        needs: Packages of which it measures those that are installed.
    """

    script: str
    arguments: tuple[str, ...]
    title: str
    rows: Callable[[Any], Iterator[Row]]
    needs: tuple[str, ...] = ()


def ratio(row: Mapping[str, float], name: str = "ratio") -> str:
    return f"{row[name]:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def steps(found: Mapping[str, Any]) -> Iterator[Row]:
    for method, row in found.items():
        memory = f"; memory {row['memory_ratio']:.2f}" if "memory_ratio" in row else ""
        yield method, ratio(row) + memory, "1.05; memory 1.05"


def predictions(found: Mapping[str, Any]) -> Iterator[Row]:
    for name, row in found["rows"].items():
        yield name, ratio(row, "forwards"), name.split()[0].removeprefix("S=")


def laplace(found: list[dict[str, Any]]) -> Iterator[Row]:
    for row in found:
        name = f"K = {row['classes']}, {row['length']} tokens"
        yield f"{name}: fit, in epochs", f"{row['fit / epoch']:.2f}", f"{1.1 * row['limit']:.2f}"
        yield f"{name}: prediction, in forwards", f"{row['predict / forward']:.1f}", ""


def laplace_memory(found: Mapping[str, int]) -> Iterator[Row]:
    epoch = found["epoch"] + found["weights"]
    for name in ("fit", "predict"):
        yield f"Laplace, {name}: tensors at the peak", f"{(found[name] + found['weights']) / epoch:.2f}", "1.05"


def peers(found: Mapping[str, Any]) -> Iterator[Row]:
    for base, parts in found.items():
        for part, unit in (("fit", "epochs"), ("predict", "forwards")):
            for method, values in parts.get(part, {}).items() if base != "versions" else ():
                middle = statistics.median(values)
                yield f"{base}: {method}, {part}, in {unit}", f"{middle:.2f} [{min(values):.2f}, {max(values):.2f}]", ""
        for method, row in parts.get("memory", {}).items() if base != "versions" else ():
            yield (
                f"{base}: {method}, added memory of fit; of prediction",
                f"{row['fit']:.0f}; {row['predict']:.0f} MB",
                "",
            )


def overhead(found: Mapping[str, Any]) -> Iterator[Row]:
    for row in found.values():
        name = f"{row['sites']} sites, {row['layers']} layers, width {row['width']}"
        yield f"{name}: a step", ratio(row), ""
        yield f"{name}: overhead, ms", f"{row['overhead']:.1f}", ""


def stores(found: Mapping[str, Any]) -> Iterator[Row]:
    for name, row in found["store"].items():
        for kind in ("save", "load"):
            yield f"{name}: {kind}, in PEFT's", ratio(row[kind]), ""
        yield f"{name}: files, in PEFT's", f"{row['size']:.2f}", ""
    for name in ("pyrolora", "pyrolora --help"):
        yield f"{name}: import, in that of torch, transformers, peft and pyro", ratio(found["import"][name]), ""


def exponents(found: Mapping[str, Any]) -> Iterator[Row]:
    for axis, content in found.items():
        for series, row in content["series"].items():
            value = ratio(row["exponent"], "value")
            yield f"{axis}, {content['sizes'][0]}–{content['sizes'][-1]}: {series}", value, f"{row['limit']:.2f}"


ROUNDS = ("--rounds", "5")
PARTS = {
    "step": Part("step_time", ("--rounds", "10"), "A training step of MiniLM, in plain PEFT LoRA's", steps),
    "step-llama": Part(
        "step_time",
        ("--base", "llama", "--rounds", "3", "--steps", "4", "--methods", "MAP", "MeanField", "Inducing", "BLoB"),
        "A training step of a Llama of 135 M parameters, in plain PEFT LoRA's",
        steps,
    ),
    "predict": Part("predict_time", ROUNDS, "S draws, in forward passes of plain LoRA", predictions),
    "laplace": Part("laplace_cost", ("--rounds", "2"), "Laplace, in plain passes over the same rows", laplace),
    "laplace-memory": Part("laplace_cost", ("--memory",), "Memory of Laplace, in an epoch of LoRA's", laplace_memory),
    "peers": Part(
        "laplace_peers",
        ("fit", "predict", "memory", "--rows", "64", "--rounds", "2"),
        "Laplace beside its peers on the same adapter",
        peers,
        needs=("laplace", "bayesian_lora"),
    ),
    "pyro": Part("pyro_overhead", (), "Pyro's overhead at the sites of Llama-7B, in the same step by hand", overhead),
    "store": Part("store_time", ROUNDS, "Files and imports", stores),
    "scaling": Part("scaling", ROUNDS, "Growth: exponents", exponents),
}


def measure(name: str, output: Path) -> bool:
    """Runs one benchmark in a process of its own; whether it came to its end."""
    part = PARTS[name]
    if absent := [package for package in part.needs if find_spec(package) is None]:
        print(f"{name}: NOT INSTALLED, and left out: {', '.join(absent)}. {part.script}.py says how to", flush=True)
        if len(absent) == len(part.needs):
            return True
    path = (output / f"{name}.json").resolve()
    path.unlink(missing_ok=True)  # what a script would add to
    plot = ("--plot", str(path.with_suffix(".png"))) if name == "scaling" else ()
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(f"{part.script}.py")), *part.arguments]
    start = time.perf_counter()
    done = subprocess.run([*command, "--out", str(path), *plot])
    said = "" if done.returncode == 0 else f"; FAILED with exit code {done.returncode}"
    print(f"{name}: {time.perf_counter() - start:.0f} s{said}", flush=True)
    return done.returncode == 0


def table(output: Path) -> str:
    """All that has been measured, as Markdown."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "pyro-ppl"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, one thread"
    lines = [f"{device}; Python {platform.python_version()}, {libraries}. Medians [95 % interval, or lowest, highest]."]
    for name, part in PARTS.items():
        path = output / f"{name}.json"
        if path.is_file():
            lines += ["", f"| {part.title} | | at most |", "| --- | --- | --- |"]
            lines += [f"| {' | '.join(row)} |" for row in part.rows(json.loads(path.read_text(encoding="utf-8")))]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--table-only", action="store_true", help="sum up what has been measured")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    failed = [name for name in options.only if not options.table_only and not measure(name, options.output)]
    path = options.output / "table.md"
    path.write_text(table(options.output), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
    if failed:
        sys.exit(f"failed, and not in the table: {', '.join(failed)}; again with --only {' '.join(failed)}")


if __name__ == "__main__":
    main()
