"""Memory of every recipe at its published size, as the comments in models/ quote it; nothing is loaded.

Run: python tests/benchmarks/recipe_memory.py --guide MeanField
     python tests/benchmarks/recipe_memory.py --recipes gpt2-wikitext2 phi-2-boolq
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from pyrolora.diagnostics.estimate import Estimate, estimate
from pyrolora.recipe import Recipe
from tests.architectures import PUBLISHED

MODELS = Path(__file__).parents[2] / "models"


def of(name: str, guide: str) -> Estimate:
    recipe = Recipe.read(MODELS / f"{name}.yaml")
    with tempfile.TemporaryDirectory() as folder:
        PUBLISHED[recipe.base].save_pretrained(folder)
        return estimate(recipe, guide, config=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guide", default="MeanField")
    parser.add_argument("--recipes", nargs="+", default=sorted(path.stem for path in MODELS.glob("*.yaml")))
    options = parser.parse_args()
    for name in options.recipes:
        print(of(name, options.guide), flush=True)


if __name__ == "__main__":
    main()
