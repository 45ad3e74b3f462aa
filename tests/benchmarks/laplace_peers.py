"""Laplace over LoRA in pyrolora, laplace-torch and bayesian-lora: time, memory, covariance and calibration, in one run.

The peers are no dependencies. In an environment that has pyrolora with its test extra:
    pip install --no-deps laplace-torch==0.3 bayesian-lora==0.0.6 curvlinops-for-pytorch==3.0.1 asdfghjkl==0.1a4 \\
        backpack-for-pytorch==1.7.1 linear_operator==0.6.1 einops==0.8.2 einconv==0.1.0 unfoldNd==0.2.3 \\
        jaxtyping==0.3.11 opt_einsum==3.4.0 torchmetrics
Run (a peer that is not installed is reported as such):
    python tests/benchmarks/laplace_peers.py fit predict --base minilm --out peers.json
    python tests/benchmarks/laplace_peers.py memory scores --base llama --rows 64 --sets sst2 --data FOLDER
    python tests/benchmarks/laplace_peers.py scores --base tiny-bert --sets sst2 cola --data FOLDER

Without --sets the sentences are the embedded task's; FOLDER holds sst2/ and cola/ as JSON Lines (text, label). All
methods get the same adapter, which is trained first, and the same batches of 16. What the file of `--out` has stays:
rounds are added, and rows of other `--methods` kept.

fit: the time of the curvature of `rows` sentences, in epochs of plain LoRA over the same batches (forward and backward,
    no optimiser). The bound to compare with is (1 + 2K)/3 for the exact Fisher information, 1 for one label.
predict: the time of the linearised mean and covariance of 16 sentences, in plain forward passes of them.
    In both, every round runs all, one after the other in an order of its own, and ratios are taken within the round.
    On a CPU the time is this process's CPU time on one thread, which other processes do not count into.
memory: what the same two add to a fresh process's resident memory at their peak, in MB.
scores: against the dense generalised Gauss-Newton matrix at one λ, that matrix's best by the evidence: the relative
    error of the covariance of a test sentence's logits (Frobenius norm, mean over sentences) and the ratio of traces
    (median); NLL and ECE of the softmax averaged over that Gaussian, at this λ and by each package's own rule for λ.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from laplace_methods import (
    BASES,
    METHODS,
    Batch,
    Exact,
    Method,
    Moments,
    Setup,
    build,
    installed,
)
from peft import PeftModel
from step_time import clock, interval
from torch import Tensor

from pyrolora.diagnostics.calibration import expected_calibration_error, negative_log_likelihood

PLAIN = "plain LoRA"
PARTS = ("fit", "predict", "memory", "scores")
SENTENCES = 16
PACKAGES = ("laplace-torch", "bayesian-lora", "curvlinops-for-pytorch", "asdfghjkl", "torch", "transformers")


class PlainLoRA:
    """An epoch of training without the optimiser, and a forward pass: the units of the others' times."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.model: Any = PeftModel.from_pretrained(setup.model(), str(setup.adapter), is_trainable=True)

    def fit(self) -> None:
        self.model.train()
        for batch in self.setup.loader():
            self.model(**batch).loss.backward()
            self.model.zero_grad()

    @torch.no_grad()
    def moments(self, batch: Batch, *precisions: float | None) -> Moments:
        self.model.eval()
        return self.model(**batch).logits, []


def made(method: str, setup: Setup) -> Method:
    return PlainLoRA(setup) if method == PLAIN else build(method, setup)


def sixteen(setup: Setup) -> Batch:
    return next(iter(setup.loader("test")))


# -- time --------------------------------------------------------------------------------------------------------------


def interleave(setup: Setup, methods: list[str], part: str, rounds: int, before: Any) -> dict[str, list[float]]:
    """Each round's times of a fit, or of a prediction, as ratios to plain LoRA's in the same round."""
    ratios: dict[str, list[float]] = before or {}
    order = random.Random(sum(map(len, ratios.values())))
    batch = sixteen(setup)
    held = {method: made(method, setup) for method in (PLAIN, *methods)}
    if part == "predict":
        for method in held.values():
            method.fit()
    for _ in range(rounds):
        times = {}
        for method in order.sample(list(held), len(held)):
            run = held[method].fit if part == "fit" else partial(held[method].moments, batch, 1.0)
            times[method] = quick(run)
        for method in methods:
            ratios.setdefault(method, []).append(times[method] / times[PLAIN])
    return ratios


def seconds(run: Callable[[], Any]) -> float:
    gc.collect()
    start = clock()
    run()
    return clock() - start


def quick(run: Callable[[], Any]) -> float:
    """The first time where it is long; else the median of the next three."""
    first = seconds(run)
    return first if first > 2 else statistics.median(seconds(run) for _ in range(3))


# -- memory ------------------------------------------------------------------------------------------------------------


def peak_in_child(setup: Setup, method: str, phase: str) -> float:
    """Megabytes that a method's fit or prediction adds at its peak, measured in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "memory", "--base", setup.base]
    command += ["--rows", str(setup.rows), "--test-rows", str(setup.test_rows)]
    command += ["--data", str(setup.data)] if setup.data else []
    command += ["--sets", *setup.sets, "--adapter", str(setup.adapter), "--child", method, phase]
    # So that what is freed goes back to the system at once, and is not counted as in use before the call.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout.strip().splitlines()[-1])


def peak(setup: Setup, method: str, phase: str) -> float:
    """The same, in this process, which must be fresh; a first forward pass has loaded what torch loads late."""
    method_, batch = made(method, setup), sixteen(setup)
    PlainLoRA(setup).moments(batch)
    if phase == "predict":
        method_.fit()
    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    method_.fit() if phase == "fit" else method_.moments(batch, 1.0)
    after = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")
    return (after - before) / 2**20


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


# -- scores ------------------------------------------------------------------------------------------------------------


def scores(setup: Setup, methods: list[str]) -> dict[str, dict[str, float]]:
    """Errors of the covariance, and NLL and ECE, by method."""
    exact = Exact(setup)
    precision = exact.best_precision()
    mean, labels = exact.test_logits, torch.tensor(setup.task.test["labels"][:])  # type: ignore[index]
    rows = {"point estimate": calibration(mean, torch.zeros_like(exact.covariance(precision)), labels)}
    rows["point estimate"] |= {"precision": precision}
    for name, blocks in (("dense", False), ("dense, each matrix alone", True)):
        covariance = exact.covariance(precision, blocks=blocks)
        rows[name] = against(covariance, exact.covariance(precision)) | calibration(mean, covariance, labels)
    for method in methods:
        own, (covariance, tuned) = predicted(method, setup, precision)
        logits = float((own - mean).abs().max())
        if logits > 1e-3:
            raise AssertionError(f"{method} sees other logits than the exact computation, by {logits}")
        rows[method] = against(covariance, exact.covariance(precision)) | calibration(own, covariance, labels)
        calibrated = calibration(own, tuned, labels)
        rows[method] |= {"logits": logits, **{f"own {name}": value for name, value in calibrated.items()}}
    return rows


def predicted(method: str, setup: Setup, precision: float) -> Moments:
    """Mean and covariances of the test sentences' logits, at λ and at the package's own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chosen = build(method, setup)
        chosen.fit()
        parts = [chosen.moments(batch, precision, None) for batch in setup.loader("test")]
    means, covariances = zip(*parts, strict=True)
    return torch.cat(means).detach(), [torch.cat(c).detach().double() for c in zip(*covariances, strict=True)]


def against(covariance: Tensor, truth: Tensor) -> dict[str, float]:
    """Relative Frobenius error, mean over sentences, and the ratio of traces, median over sentences."""
    error = torch.linalg.matrix_norm(covariance - truth) / torch.linalg.matrix_norm(truth)
    traces = [c.diagonal(dim1=-2, dim2=-1).sum(-1) for c in (covariance, truth)]
    return {"error": float(error.mean()), "trace": float((traces[0] / traces[1]).median())}


def calibration(mean: Tensor, covariance: Tensor, labels: Tensor, num_points: int = 1024) -> dict[str, float]:
    """NLL and ECE of the softmax averaged over quasi-Monte Carlo points of ``N(mean, covariance)``."""
    engine = torch.quasirandom.SobolEngine(mean.shape[-1], scramble=True, seed=0)
    white = torch.special.ndtri(engine.draw(num_points, dtype=torch.double).clamp(1e-9, 1 - 1e-9))
    values, vectors = torch.linalg.eigh(covariance.double())
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    draws = mean.double() + torch.einsum("nkj,sj->snk", root, white)
    log_mean = (draws.log_softmax(-1).logsumexp(0) - torch.tensor(float(num_points)).log()).numpy()
    metrics = {"nll": negative_log_likelihood, "ece": expected_calibration_error}
    return {name: metric(log_mean, labels.numpy()) for name, metric in metrics.items()}


# -- report ------------------------------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
    """One base model's results as Markdown tables, one for each part."""
    parts = []
    times = {"fit": "fit, epochs", "predict": "16 sentences, forwards"}
    timed = {part: results[part] for part in times if part in results}
    if timed:
        names = dict.fromkeys(name for ratios in timed.values() for name in ratios)
        rows = {n: {part: interval(r[n]) for part, r in timed.items() if n in r} for n in names}
        parts.append(_markdown(rows, {part: times[part] for part in timed}))
    if "memory" in results:
        parts.append(_markdown(results["memory"], {"fit": "fit, MB", "predict": "16 sentences, MB"}))
    if "scores" in results:
        columns = {"error": "covariance error", "trace": "trace ratio", "nll": "NLL", "ece": "ECE"}
        columns |= {"own nll": "NLL, own λ", "own ece": "ECE, own λ"}
        parts.append(_markdown(results["scores"], columns))
    return "\n\n".join(parts)


def _markdown(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for name, row in rows.items()]
    missing = [method for method in METHODS if not installed(method)]
    return "\n".join(lines + [f"| {method} | " + "not installed |" + " |" * (len(columns) - 1) for method in missing])


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['ratio']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
    return "" if value is None else f"{value:.3g}"


def measure(part: str, setup: Setup, methods: list[str], rounds: int, before: Any) -> Any:
    if part in ("fit", "predict"):
        return interleave(setup, methods, part, rounds, before)
    if part == "memory":
        found = {m: {p: peak_in_child(setup, m, p) for p in ("fit", "predict")} for m in (PLAIN, *methods)}
    else:
        found = scores(setup, methods)
    return {**(before or {}), **found}


def versions(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--base", choices=BASES, default="minilm")
    parser.add_argument("--data", type=Path, help="folder of sst2/ and cola/")
    sets = ["commonsense", "sst2", "cola"]
    parser.add_argument("--sets", nargs="+", choices=sets, default=["commonsense"], help="two classes each")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--test-rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=6, help="of training the adapter")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--adapter", type=Path, help="folder to keep the adapter in, or to take it from")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        adapter = options.adapter or Path(folder)
        setup = Setup(options.base, tuple(options.sets), options.data, options.rows, options.test_rows, adapter)
        if options.child:
            print(peak(setup, *options.child))
            return
        setup.train(options.epochs)
        methods = [method for method in options.methods if installed(method)]
        everything = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
        results = everything.setdefault(f"{setup.base}, {' + '.join(setup.sets)}, {setup.rows} rows", {})
        for part in options.parts:
            results[part] = measure(part, setup, methods, options.rounds, results.get(part))
    print(table(results))
    if options.out:
        options.out.write_text(json.dumps({**everything, "versions": versions(PACKAGES)}, indent=2))


if __name__ == "__main__":
    main()
