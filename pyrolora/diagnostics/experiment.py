"""A whole comparison: recipes × guides × seeds and saved posteriors, fitted, evaluated and written to a folder."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from pyrolora.construct import RecipeError
from pyrolora.diagnostics import cells
from pyrolora.diagnostics.cells import BASELINE, Cell, Method
from pyrolora.diagnostics.results import assemble, write
from pyrolora.inference.archive import read_meta, writing
from pyrolora.inference.processes import count, gather, join, rank, wait
from pyrolora.likelihoods.base import ClassLikelihood
from pyrolora.recipe import Recipe
from pyrolora.saved import recipe_of
from pyrolora.tasks.base import Task

logger = logging.getLogger("pyrolora")

Tasks = dict[Path, Task]
"""By the recipe's path."""

_tasks: Tasks = {}  # of a worker process


def run(
    recipes: Sequence[Recipe],
    guides: Sequence[str],
    *,
    seeds: Sequence[int],
    output: Path,
    posteriors: Sequence[Path] = (),
    num_draws: int = 16,
    baseline: str | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Fits and evaluates every method with every seed, and every saved posterior.

    Each finished fit leaves the posterior ``<method>-seed<k>/``, each finished evaluation two files in ``cells/``.
    Called again, a fit is not repeated unless its recipe or training data have changed, nor an evaluation unless its
    posterior, any data or the number of draws have. ``results.json`` and ``results.parquet`` are written after every
    cell, so that an interrupted comparison can be reported as far as it came. A cell that fails stops no other.

    Launched as several processes (``torchrun``), all of them make each fit together, and a fit that fails stops them
    all; then each evaluates its share of the cells, and the first writes the results.

    Args:
        recipes: The probabilistic models. Where there are several, methods are called ``<recipe>: <guide>``.
        guides: Names of guides for every recipe, or none: then each brings its own. Plain LoRA is added under each
            recipe where it is not the same as an earlier one.
        seeds: Each seeds initial weights, data order and noise.
        output: The folder.
        posteriors: Folders of saved posteriors with their recipes beside them; called by the folders' names.
        num_draws: S at test.
        baseline: The method that all others are compared with; default the first.
        processes: How many cells are worked on at once, each with its share of the cores; 1 for launched processes.

    Returns:
        The results, as written to ``results.json``; ``failed`` has the message of each cell that raised, by its name.

    Raises:
        RecipeError: An unknown method; a task without classes, or without validation or test split; methods that are
            evaluated on different data; ``processes`` below 1, or above it for launched ones.
    """
    join()
    _check_processes(processes)
    methods = plan(recipes, guides, posteriors)
    chosen = _baseline(methods, baseline)
    tasks = _build_tasks(methods)
    planned = _cells(methods, seeds, num_draws=num_draws, output=output)
    with writing(output):
        (output / "cells").mkdir(parents=True, exist_ok=True)
    done = _finished(planned, tasks)
    failed: dict[str, str] = {}
    write_now = partial(_write, planned, done, failed, tasks, baseline=chosen, recipes=recipes, output=output)
    results = write_now()
    pending = [cell for cell in planned if cell.name not in done]
    for cell, error in _computed(pending, tasks, processes=processes):
        if error is None:
            done.add(cell.name)
        else:
            failed[cell.name] = error
            logger.error("%s, seed %d failed: %s", cell.method.name, cell.seed, error)
        results = write_now()
    return results


def _finished(planned: Sequence[Cell], tasks: Tasks) -> set[str]:
    """The names of cells that are done; all processes have looked before the first of them adds to it."""
    done = [cell for cell in planned if cells.is_finished(cell, tasks[cell.method.recipe.path])]
    for cell in done:
        logger.info("%s, seed %d: finished before", cell.method.name, cell.seed)
    wait()
    return {cell.name for cell in done}


def _check_processes(processes: int) -> None:
    if processes < 1:
        raise RecipeError(f"--processes is at least 1, not {processes}")
    if processes > 1 and count() > 1:
        raise RecipeError(
            f"--processes {processes} with {count()} launched processes: those share the work; leave it 1"
        )


def _write(
    planned: Sequence[Cell],
    done: set[str],
    failed: Mapping[str, str],
    tasks: Tasks,
    *,
    baseline: str,
    recipes: Sequence[Recipe],
    output: Path,
) -> dict[str, Any]:
    """Writes the results as far as they have come."""
    finished = [cell for cell in planned if cell.name in done]
    task = tasks[planned[0].method.recipe.path]
    results = assemble(finished, task, baseline=baseline, recipes=recipes) | {"failed": dict(failed)}
    if rank() == 0:
        write(results, output)
    return results


def plan(recipes: Sequence[Recipe], guides: Sequence[str], posteriors: Iterable[Path] = ()) -> list[Method]:
    """The methods of a comparison: under each recipe plain LoRA and the named guides; then the saved posteriors.

    Where no guides are named, each recipe brings those that it configures itself, unless there are posteriors.

    Raises:
        RecipeError: An unknown guide (the right ones are listed) or arguments that it refuses, two methods whose files
            would have the same name, or nothing to compare.
    """
    for recipe, name in product(recipes, guides):
        known = [BASELINE, *recipe.guide_names]
        if name not in known:
            raise RecipeError(f"{recipe.path}: unknown guide {name!r}; there are {', '.join(known)}")
    posteriors = list(posteriors)
    own = {recipe.path: list(guides or ([] if posteriors else recipe.guides)) for recipe in recipes}
    if empty := [str(path) for path, names in own.items() if not names and not posteriors]:
        raise RecipeError(
            f"{empty[0]}: nothing would be fitted but plain LoRA: name guides to compare it with (--guides, or guides: "
            "in the recipe)"
        )
    methods: list[Method] = []
    seen = []
    for recipe in recipes:
        # Plain LoRA sees neither priors nor guides: recipes that differ in nothing else share it.
        content = {**recipe.content(), "priors": None, "guides": None, "temperature": None}
        first = [] if content in seen else [BASELINE]
        seen.append(content)
        for guide in dict.fromkeys([*first, *(name for name in own[recipe.path] if name != BASELINE)]):
            name = guide if len(recipes) == 1 else f"{recipe.path.stem}: {guide}"
            methods.append(Method(name, guide, recipe))
            methods[-1].build_guide()  # a wrong argument stops here, not after the fits before it
    for folder in posteriors:
        recipe = recipe_of(folder)
        guide = read_meta(folder)["guide"]["class"].partition(".")[2]
        methods.append(Method(folder.resolve().name, guide, recipe, folder))
    if not methods:
        raise RecipeError("there is nothing to compare: give recipes, or posteriors")
    names = [cells.plain(method.name) for method in methods]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f"two methods are called {twice[0]!r}: rename a recipe's file or a posterior's folder")
    return methods


def _baseline(methods: Sequence[Method], name: str | None) -> str:
    names = [method.name for method in methods]
    if name is not None and name not in names:
        raise RecipeError(f"the baseline {name!r} is none of the methods {', '.join(names)}")
    return names[0] if name is None else name


def _cells(methods: Sequence[Method], seeds: Sequence[int], *, num_draws: int, output: Path) -> list[Cell]:
    """Seed by seed, so that an interrupted comparison has all methods for the first seeds; saved posteriors first."""
    saved = [(read_meta(method.folder)["seed"], method) for method in methods if method.folder is not None]
    fitted = product(seeds, [method for method in methods if method.folder is None])
    return [Cell(method, seed, num_draws, output) for seed, method in [*saved, *fitted]]


def _build_tasks(methods: Sequence[Method]) -> Tasks:
    """The task of every recipe; all must be evaluated on the same data, and over the same classes.

    Raises:
        RecipeError: A task without classes, or without validation or test split; different data.
    """
    tasks: Tasks = {}
    made: dict[str, Task] = {}
    for recipe in (method.recipe for method in methods):
        key = cells.digest([recipe.base, recipe.task])
        if key not in made:
            made[key] = recipe.build_task()
            _check_task(made[key], recipe)
        tasks[recipe.path] = made[key]
    first, *others = methods
    reported = _reported(tasks[first.recipe.path])
    for method in others:
        if _reported(tasks[method.recipe.path]) != reported:
            raise RecipeError(
                f"{method.recipe.path}: other test or out-of-distribution data, or other classes, than those of "
                f"{first.recipe.path}: numbers on different examples cannot be compared"
            )
    return tasks


def _reported(task: Task) -> tuple[Any, str]:
    data = {name: rows for name, rows in cells.splits_of(task).items() if name not in ("train", "validation")}
    return task.class_names, cells.digest_of(data)


def _check_task(task: Task, recipe: Recipe) -> None:
    if not isinstance(task.likelihood, ClassLikelihood):
        kind = type(task.likelihood).__name__
        raise RecipeError(f"{recipe.path}: a comparison scores classes; the likelihood of this task is {kind}")
    for split, data in {"validation": task.validation, "test": task.test}.items():
        if data is None:
            raise RecipeError(f"{recipe.path}: a comparison needs a {split} split; the task has none")
    for split, rows in task.ood.items():
        if not cells.is_labelled(rows):
            logger.info("%s: labels that are no classes of the task; not scored, only told apart from test", split)


def _computed(pending: Sequence[Cell], tasks: Tasks, *, processes: int) -> Iterator[tuple[Cell, str | None]]:
    """Computes cells, and yields each when it is done, with the message of what it raised."""
    if count() > 1:
        return _together(pending, tasks)
    if processes == 1 or len(pending) <= 1:
        return _in_turn(pending, tasks)
    return _at_once(pending, processes)


def _in_turn(pending: Sequence[Cell], tasks: Tasks) -> Iterator[tuple[Cell, str | None]]:
    """One cell after another in this process."""
    for i, cell in enumerate(pending, start=1):
        doing = "evaluating" if cell.method.folder or count() > 1 else "fitting"
        logger.info("[%d/%d] %s, seed %d: %s", i, len(pending), cell.method.name, cell.seed, doing)
        try:
            cells.compute(cell, tasks[cell.method.recipe.path])
        except Exception as raised:
            yield cell, _message(raised)
        else:
            yield cell, None


def _together(pending: Sequence[Cell], tasks: Tasks) -> Iterator[tuple[Cell, str | None]]:
    """Each fit by all launched processes, each evaluation by one of them.

    What a fit raises is not caught: the others may be waiting for this process's gradients.
    """
    for i, cell in enumerate(pending, start=1):
        if cell.method.folder is None:
            logger.info("[%d/%d] %s, seed %d: fitting", i, len(pending), cell.method.name, cell.seed)
            cells.fitted(cell, tasks[cell.method.recipe.path])
    wait()
    own = [(cell.name, error) for cell, error in _in_turn(pending[rank() :: count()], tasks)]
    errors = dict(outcome for share in gather(own) for outcome in share)
    yield from ((cell, errors[cell.name]) for cell in pending)


def _at_once(pending: Sequence[Cell], processes: int) -> Iterator[tuple[Cell, str | None]]:
    """Several cells at once, each in a worker."""
    threads = max(1, torch.get_num_threads() // processes)
    # A forked process would inherit torch's threads, and locks that they hold.
    context = multiprocessing.get_context("spawn")
    with (
        _without_progress_bars(),
        ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(threads,)) as pool,
    ):
        futures = {pool.submit(_work, cell): cell for cell in pending}
        try:
            for i, future in enumerate(as_completed(futures), start=1):
                cell, error = futures[future], future.exception()
                if error is not None and not isinstance(error, Exception):
                    raise error
                if error is None:
                    logger.info("[%d/%d] %s, seed %d: done", i, len(pending), cell.method.name, cell.seed)
                yield cell, None if error is None else _message(error)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _message(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _begin(threads: int) -> None:
    """What a worker does first: its share of the cores, and no remarks of libraries that every worker would repeat."""
    logging.basicConfig(format="%(message)s")
    torch.set_num_threads(threads)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()


def _work(cell: Cell) -> None:
    """One cell in a worker, which builds a task once."""
    recipe = cell.method.recipe
    if recipe.path not in _tasks:
        _tasks[recipe.path] = recipe.build_task()
    cells.compute(cell, _tasks[recipe.path])


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Processes that start in this block show no bars: those of several would overwrite one another."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before
