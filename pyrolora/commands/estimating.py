"""The command that says what a recipe needs before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from pyrolora.diagnostics.estimate import estimate as estimate_memory
from pyrolora.recipe import Recipe


def estimate(
    recipe: Path,
    *,
    guide: str = "MeanField",
    config: Path | None = None,
    batch_size: int | None = None,
    length: int | None = None,
    draws: int = 16,
    checkpointing: bool | None = None,
) -> None:
    """Estimates parameters and memory of a fit and a prediction, by part.

    From the architecture alone: no weights, no data and no GPU are needed. The
    model runs without contents, and every allocation is counted. Add some
    0.5 GiB for the GPU's context, and room for fragmentation.

    Examples:
      pyrolora estimate models/minilm-commonsense.yaml --guide Inducing
      pyrolora estimate models/qwen3-8b-race.yaml --batch-size 8 --length 512
      pyrolora estimate models/phi-2-boolq.yaml --config folder/config.json

    Args:
        recipe: A YAML file.
        guide: How the posterior is approximated: one of the list below, or a configuration that the recipe names.
        config: The base model's config.json, where the hub cannot be reached.
        batch_size: Rows at once; without it, the recipe's in training and 32 in prediction.
        length: Tokens of a row; without it, the longest that the recipe allows.
        draws: Number of draws of a prediction.
        checkpointing: Activation checkpointing in training; without it, as the recipe says.
    """
    print(
        estimate_memory(
            Recipe.read(recipe),
            guide,
            config=config,
            batch_size=batch_size,
            length=length,
            draws=draws,
            checkpointing=checkpointing,
        )
    )
