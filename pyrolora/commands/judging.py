"""Commands that judge one posterior."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Literal

import pandas as pd
from datasets import Dataset

from pyrolora.commands.using import TABLES
from pyrolora.construct import RecipeError
from pyrolora.diagnostics.diagnose import diagnose as diagnose_posterior
from pyrolora.diagnostics.evaluation import Evaluation, evaluate_posterior, fit_scaling
from pyrolora.diagnostics.language import LanguageEvaluation, evaluate_language
from pyrolora.diagnostics.tokens import token_uncertainty
from pyrolora.inference.archive import replacing, write_json, writing
from pyrolora.likelihoods.next_token import NextToken
from pyrolora.report.diagnosis import write_pictures
from pyrolora.saved import load

logger = logging.getLogger("pyrolora")


def evaluate(
    folder: Path,
    *,
    split: str = "test",
    draws: int = 16,
    seed: int = 0,
    tokens: Path | None = None,
    format: Literal["table", "json"] = "table",
) -> None:
    """Scores a saved posterior on a split, with and without temperature scaling.

    The temperature is fitted on the validation split, never on the one scored.
    The test split is also told from every out-of-distribution split.
    Of a language model it gives the perplexity per token, and in a file the log
    probability, entropy and mutual information of every token.

    Examples:
      pyrolora evaluate runs/mf
      pyrolora evaluate runs/mf --split validation --draws 64 --format json
      pyrolora evaluate runs/lm --tokens tokens.parquet

    Args:
        folder: What `pyrolora fit` wrote.
        split: test, validation, train, or the name of an out-of-distribution split.
        draws: Number of draws; 0 scores the posterior's mean weights.
        seed: Of the draws.
        tokens: Of a language model: a .csv, .jsonl or .parquet file that gets a row for each token.
        format: table, or json for programs.
    """
    if tokens is not None and tokens.suffix not in TABLES:
        raise RecipeError(f"--tokens {tokens}: the ending is one of {', '.join(TABLES)}")
    posterior, task = load(folder)
    splits = {"test": task.test, "validation": task.validation, "train": task.train, **task.ood}
    data = splits.get(split)
    if data is None:
        there = ", ".join(name for name, found in splits.items() if found is not None)
        raise RecipeError(f"{folder}: no split {split!r}; there are {there}")
    if tokens is not None and not isinstance(task.likelihood, NextToken):
        raise RecipeError(f"{folder}: --tokens is for language models; `pyrolora predict` has a row for each input")
    result: Evaluation | LanguageEvaluation
    if isinstance(task.likelihood, NextToken):
        result = evaluate_language(posterior, data, num_draws=draws, seed=seed)
    else:
        scaling = None
        if split != "validation" and isinstance(task.validation, Dataset):
            scaling = fit_scaling(posterior, task.validation, num_draws=draws, seed=seed)
        elif split == "validation" and (posterior.scaling != 1 or posterior.guide.saw_validation(posterior.program)):
            logger.warning("the posterior was calibrated on the validation split: these figures are too good")
        ood = task.ood if split == "test" else {}
        result = evaluate_posterior(posterior, data, scaling=scaling, ood=ood, num_draws=draws, seed=seed)
    if format == "json":
        plain = json.dumps({"split": split, **result.to_dict()})
        print(json.dumps(json.loads(plain, parse_constant=lambda _: None), indent=2))  # JSON has no NaN
    else:
        print(f"{split}: {result}")
    if tokens is not None:
        _write(token_uncertainty(posterior, data, num_draws=draws, seed=seed), tokens)


def _write(table: pd.DataFrame, file: Path) -> None:
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as new:
        TABLES[file.suffix](table, new)
    logger.info("%d tokens in %s", len(table), file)


def diagnose(
    folder: Path,
    *,
    runs: list[Path],
    against: list[Path],
    draws: int = 100,
    budget: int = 40_000,
    sites: str = "*",
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Says what is fine in a saved posterior, what is not, and what to do.

    Noise, KL and rank by layer, Pareto k of guide against model, leave-one-out,
    prior sensitivity, prior and posterior predictive checks, R-hat across runs:
    on screen, in diagnosis.json and as pictures.

    Examples:
      pyrolora diagnose runs/mf
      pyrolora diagnose runs/mf --runs runs/mf-seed1 runs/mf-seed2
      pyrolora diagnose runs/mf --against runs/laplace --draws 50

    Args:
        folder: What `pyrolora fit` wrote.
        runs: Folders of the same fit with other seeds, for R-hat.
        against: Folders of other posteriors on the same data, compared by leave-one-out.
        draws: Number of draws, at least 25.
        budget: The most training rows × draws; beyond it leave-one-out sees a part of the rows.
        sites: Pattern of the random sites for k of guide against model; the others stand at their means.
        seed: Of the draws.
        output: Folder for diagnosis.json and the pictures; without it, diagnosis/ in the posterior's folder.
    """
    posterior, _ = load(folder)
    found = diagnose_posterior(
        posterior,
        runs=[load(other)[0] for other in runs],
        against={str(other): load(other)[0] for other in against},
        num_draws=draws,
        budget=budget,
        sites=sites,
        seed=seed,
    )
    print(found)
    output = output or folder / "diagnosis"
    pictures = write_pictures(found.tree, found.layers, found.checks, found.loo, output)
    write_json(output / "diagnosis.json", found.to_dict())
    print(f"\nin {output}: diagnosis.json, {', '.join(path.name for path in pictures)}")
