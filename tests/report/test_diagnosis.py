"""Pictures of a diagnosis."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from arviz_base import from_dict
from matplotlib import pyplot
from PIL import Image
from xarray import DataTree

from pyrolora.diagnostics.psis import loo
from pyrolora.report.diagnosis import write_pictures

GENERATOR = np.random.default_rng(0)
LAYERS = pd.DataFrame(
    {
        "kind": ["query", "query", "value", "value", "head.bias"],
        "layer": [3, 7, 3, 7, 0],
        "random": [8, 8, 8, 8, 0],
        "kl": [1.0, 2.0, 8.0, 16.0, np.nan],
        "kl_per_number": [0.125, 0.25, 1.0, 2.0, np.nan],
        "noise_to_mean": [0.5, np.inf, 2.0, 1.0, np.nan],
        "effective_rank": [1.0, 2.0, 1.5, 1.2, np.nan],
    }
)
CHECK = pd.DataFrame(
    {"observed": [0.7, -0.6], "expected": [0.8, -0.5], "sd": [0.02, 0.05], "low": [0.75, -0.6], "high": [0.85, -0.4]},
    index=["accuracy", "log score"],
)


def tree(*, prior: bool = True, noise: float = 1.0, chains: int = 2) -> DataTree:
    def draws(*shape: int) -> np.ndarray:
        return 1 + noise * GENERATOR.normal(0, 0.1, (chains, 50, *shape))

    posterior = {"log score": draws(), "confidence": draws()}
    posterior |= {f"update lora.{kind}": draws(2) for kind in ("query", "value")}
    posterior |= {f"size lora.{kind}.A": draws(2, 3) for kind in ("query", "value")}
    groups = {"posterior": posterior}
    if prior:
        groups["prior"] = {f"size lora.{kind}.A": 2 * draws(2, 3)[:1] for kind in ("query", "value")}
    names = {name: ["layer", "rank"][: value.ndim - 2] for name, value in posterior.items()}
    return from_dict(groups, dims=names, coords={"layer": [3, 7]})


def is_drawn(path: Path) -> bool:
    pixels = np.asarray(Image.open(path).convert("L"))
    return pixels.shape[0] > 100 and float(pixels.std()) > 5


def test_all_pictures(tmp_path: Path) -> None:
    """Law: every picture is a PNG with something on it; the caller's Matplotlib is left as it was."""
    before, open_figures = matplotlib.rcParams["axes.prop_cycle"], pyplot.get_fignums()
    result = loo(-0.5 + 0.1 * GENERATOR.normal(size=(50, 8)))
    paths = write_pictures(tree(), LAYERS, {"prior": CHECK, "posterior": CHECK}, result, tmp_path / "new")
    names = {"layers.png", "checks.png", "updates.png", "ranks.png", "density.png", "trace.png", "khat.png"}
    assert {path.name for path in paths} == names == {path.name for path in (tmp_path / "new").iterdir()}
    assert all(is_drawn(path) for path in paths)
    assert matplotlib.rcParams["axes.prop_cycle"] == before and pyplot.get_fignums() == open_figures


def test_what_does_not_vary_is_not_drawn(tmp_path: Path) -> None:
    """Law: a point estimate has the heat map alone, and pictures of an earlier diagnosis do not stay."""
    write_pictures(tree(), LAYERS, {}, None, tmp_path)
    still = LAYERS.assign(kl=np.nan, kl_per_number=np.nan, noise_to_mean=np.nan)
    paths = write_pictures(tree(noise=0.0), still, {}, None, tmp_path)
    assert [path.name for path in paths] == ["layers.png"] == [path.name for path in tmp_path.iterdir()]


def test_without_a_prior_there_is_a_ridge(tmp_path: Path) -> None:
    """Law: sites with a flat prior are drawn alone."""
    paths = write_pictures(tree(prior=False, chains=1), LAYERS, {}, None, tmp_path)
    assert "density.png" in {path.name for path in paths} and all(is_drawn(path) for path in paths)


@pytest.mark.parametrize("layers", [40, 200])
def test_many_layers_are_thinned(tmp_path: Path, layers: int) -> None:
    """Law: a picture keeps a size that can be looked at, however deep the model."""
    rows = {"layer": list(range(layers)), "kind": "value", "random": 8, "kl": 1.0, "kl_per_number": 0.1}
    table = pd.DataFrame({**rows, "noise_to_mean": 1.0, "effective_rank": 1.0})
    values = GENERATOR.normal(size=(1, 30, layers, 8))
    deep = from_dict(
        {"posterior": {"size lora.value.A": values, "update lora.value": values[..., 0]}},
        dims={"size lora.value.A": ["layer", "rank"], "update lora.value": ["layer"]},
        coords={"layer": list(range(layers))},
    )
    for path in write_pictures(deep, table, {}, None, tmp_path):
        assert max(Image.open(path).size) < 16_000
    assert Image.open(tmp_path / "ranks.png").size[1] < 2500
