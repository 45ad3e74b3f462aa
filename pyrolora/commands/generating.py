"""The command that writes text with a language model's posterior."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Literal

from pyrolora.construct import RecipeError
from pyrolora.inference.generate import generate as generate_texts
from pyrolora.inference.generation import Generation
from pyrolora.report.terminal import legend, marked
from pyrolora.saved import load


def generate(
    folder: Path,
    *,
    prompt: list[str],
    max_new_tokens: int,
    levels: list[float],
    chat: bool = False,
    file: Path | None = None,
    draws: int = 8,
    how: Literal["mixture", "draws"] = "mixture",
    weights: Literal["predictive", "uniform"] = "predictive",
    temperature: float = 1.0,
    seed: int = 0,
    format: Literal["text", "json"] = "text",
) -> None:
    """Continues prompts with a language model's posterior; marks what it doubts.

    A word is doubted by its mutual information with the weights: by what other
    draws of them would have said. In a terminal it stands on yellow or red; piped,
    [?] or [??] stands behind it. JSON has the numbers of every token.

    Examples:
      pyrolora generate runs/lm --prompt "The cold stone" --draws 8
      pyrolora generate runs/lm --file prompts.txt --temperature 0 --format json
      pyrolora generate runs/chat --chat --prompt "Which river?" --how draws

    Args:
        folder: What `pyrolora fit` wrote, of a causal language model.
        prompt: A text to continue; may be given several times.
        max_new_tokens: The most tokens of a continuation.
        levels: Mutual information of a word from which it is doubted, and much doubted.
        chat: Put each prompt into the tokenizer's chat template, as the user's turn; the text is the reply.
        file: A text file with a prompt in each line.
        draws: Number of draws; 0 uses the posterior's mean weights, which doubt nothing.
        how: One text of the mixture of all draws, or one text of each draw and how far they differ.
        weights: Of a mixture's draws: by how well each predicts the text so far, or all the same.
        temperature: Of sampling; 0 takes the most probable token.
        seed: Of the draws and of sampling.
        format: text, or json for programs.
    """
    prompts = _prompts(prompt, file)
    if not 0 < levels[0] <= levels[1]:
        raise RecipeError(f"--levels are two numbers above 0, the lower one first, not {levels[0]:g} {levels[1]:g}")
    posterior, _ = load(folder)
    found = generate_texts(
        posterior,
        prompts,
        num_draws=draws,
        max_new_tokens=max_new_tokens,
        how=how,
        weights=weights,
        temperature=temperature,
        seed=seed,
        chat=chat,
    )
    if format == "json":
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        _show(found, levels, between="\n" if chat else "")


def _show(found: Generation, levels: list[float], *, between: str) -> None:
    """Prints prompts and texts with what stands between them; the legend only where a person reads it."""
    terminal = sys.stdout.isatty()
    colour = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    differences = found.disagreement or [None] * len(found)
    for texts, difference in zip(found, differences, strict=True):
        for text in texts:
            print(text.prompt + between + marked(text, levels, colour=colour))
        if difference is not None:
            print(f"  {difference.differing:.0%} of pairs differ, mean edit distance {difference.edit_distance:.2f}")
    if terminal and found.how == "mixture":
        print(legend(levels, colour=colour))


def _prompts(prompt: list[str], file: Path | None) -> list[str]:
    """Those given, then the lines of a file that are not blank."""
    prompts = [*prompt, *(_lines(file) if file is not None else [])]
    if not prompts:
        raise RecipeError("nothing to continue: give --prompt TEXT or --file prompts.txt")
    return prompts


def _lines(file: Path) -> list[str]:
    """The lines of a file that are not blank."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is not UTF-8 text: {error}") from error
    return [line for line in text.splitlines() if line.strip()]
