"""Pictures of a diagnosis as PNG files: what ArviZ draws from the tree, a heat map of layers, predictive checks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from arviz_base.labels import NoVarLabeller
from arviz_stats import ELPDData
from cycler import cycler
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from xarray import Dataset, DataTree

Drawing = Callable[[Any], Any]

_COLOURS = ("#2f6db3", "#d1762c", "#3b8f5a", "#a3476b", "#6f5fa8", "#8a7a3a", "#4a9aa8", "#777777")
_MOST_ROWS = 64
_MOST_PANELS = 16
_HEAT = {
    "kl_per_number": "KL(q ‖ p), nats for each random number",
    "noise_to_mean": "noise of ΔW ÷ its mean",
    "effective_rank": "effective rank of mean ΔW",
}


def write_pictures(
    tree: DataTree, layers: pd.DataFrame, checks: Mapping[str, pd.DataFrame], loo: ELPDData | None, folder: Path
) -> list[Path]:
    """Writes what can be drawn of a diagnosis, and returns the paths.

    ``layers.png``: heat maps over layers. ``updates.png``: ‖ΔW‖ by kind and layer. ``ranks.png``, ``density.png``: the
    size of a site's entries by layer and rank, and by rank against the prior in the layer that moved most.
    ``trace.png``: predictions of each draw, a colour for each run. ``khat.png``: Pareto k̂ of each row. ``checks.png``:
    observed labels against those that prior and posterior make.

    Args:
        tree: ``Diagnosis.tree``.
        layers: ``Diagnosis.layers``.
        checks: ``Diagnosis.checks``.
        loo: ``Diagnosis.loo``.
        folder: Where to; made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    posterior = tree["posterior"].to_dataset()
    site = _site(posterior, layers)
    # Rank k of one run is not rank k of another: any rotation of the ranks is the same update.
    alone = DataTree.from_dict(
        {n: t.to_dataset().isel(chain=[0]) for n, t in tree.children.items() if "chain" in t.dims}
    )
    drawings: dict[str, Drawing | None] = {
        "updates.png": _updates(tree, posterior),
        "ranks.png": None if site is None else _ranks(alone, posterior, site),
        "density.png": None if site is None else _density(alone, posterior, site, layers),
        "trace.png": _trace(tree, posterior),
        "khat.png": None if loo is None else partial(_khat, loo=loo),
    }
    written = [_heat_maps(layers, folder / "layers.png")]
    if checks:
        written.append(_intervals(checks, folder / "checks.png"))
    with _arviz_plots() as azp:
        for name, draw in drawings.items():
            (folder / name).unlink(missing_ok=True)  # what an earlier diagnosis drew
            if draw is not None:
                figure = draw(azp).viz["figure"].item()
                figure.savefig(folder / name, dpi=100, bbox_inches="tight")
                import_module("matplotlib.pyplot").close(figure)
                written.append(folder / name)
    return written


@contextmanager
def _arviz_plots() -> Iterator[Any]:
    """ArviZ's plots, imported when they are needed, with colours that they understand."""
    with warnings.catch_warnings(), rc_context({"axes.prop_cycle": cycler(color=_COLOURS)}):
        warnings.simplefilter("ignore")
        with suppress(ImportError):
            # arviz-plots 0.8 looks at this module, which Matplotlib 3.11 no longer imports by itself.
            import_module("matplotlib.style.core")
        yield import_module("arviz_plots")


# -- our own ---------------------------------------------------------------------------------------------------------


def _heat_maps(layers: pd.DataFrame, path: Path) -> Path:
    """KL, noise-to-mean and effective rank, kinds of modules down and layers across; grey where there is none."""
    shown = [name for name in _HEAT if layers[name].notna().any()] or ["effective_rank"]
    tables = [layers.pivot(index="kind", columns="layer", values=name) for name in shown]
    tables = [table.dropna(how="all").dropna(how="all", axis=1) for table in tables]
    wide = max(5.0, 2.5 + 0.55 * max(table.shape[1] for table in tables))
    figure = Figure(figsize=(wide, sum(1.2 + 0.4 * len(t) for t in tables)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(tables), 1, squeeze=False, height_ratios=[1 + len(table) for table in tables])[:, 0]
    colours = colormaps["viridis"].with_extremes(bad="#dddddd")
    for axes, name, table in zip(rows, shown, tables, strict=True):
        values = np.where(np.isfinite(table), table, np.nan).astype(float)
        image = axes.imshow(values, aspect="auto", cmap=colours)
        middle = np.nanmin(values) / 2 + np.nanmax(values) / 2 if np.isfinite(values).any() else 0.0
        for (i, j), value in np.ndenumerate(values):
            if table.shape[1] <= 16 and math.isfinite(value):
                ink = "white" if value < middle else "black"
                axes.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=8, color=ink)
        axes.set(title=_HEAT[name], xlabel="layer" if axes is rows[-1] else "")
        axes.set_xticks(range(table.shape[1]), table.columns)
        axes.set_yticks(range(len(table)), table.index)
        figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=110)
    return path


def _intervals(checks: Mapping[str, pd.DataFrame], path: Path) -> Path:
    """For each statistic what prior and posterior expect (95 %), and what was observed."""
    observed = list(checks.values())[-1]["observed"]
    figure = Figure(figsize=(7.5, 0.7 + 0.85 * len(observed)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(observed), 1, squeeze=False)[:, 0]
    for axes, (name, value) in zip(rows, observed.items(), strict=True):
        for height, (which, table) in enumerate(checks.items()):
            if which == "prior" and name in ("accuracy", "log score"):
                continue  # those are of a predictive's own favourite, so that the two are not comparable
            row = table.loc[name]
            axes.plot([row["low"], row["high"]], [height] * 2, color=_COLOURS[height], linewidth=4, alpha=0.5)
            axes.plot(row["expected"], height, "o", color=_COLOURS[height])
            axes.text(row["high"], height, f"  {which}", va="center", fontsize=8, color=_COLOURS[height])
        axes.axvline(value, color="black", linewidth=1.5)
        axes.set(yticks=[], ylim=(-0.7, len(checks) - 0.3))
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.margins(x=0.15)
        axes.spines[["top", "right", "left"]].set_visible(False)
    rows[0].set_title("held-out labels: observed (line), and what is expected (mean and 95 %)", fontsize=10)
    figure.savefig(path, dpi=110)
    return path


# -- ArviZ's ---------------------------------------------------------------------------------------------------------


def _updates(tree: DataTree, posterior: Dataset) -> Drawing | None:
    names = [str(name) for name in posterior if str(name).startswith("update ") and _varies(posterior[name])]
    if not names:
        return None
    sizes = np.cumsum([posterior[name].shape[-1] for name in names])
    shown = max(1, int((sizes <= _MOST_ROWS).sum()))
    title = "‖ΔW‖ of the draws, by kind of module and layer, a colour for each run"
    rows, colours = int(sizes[shown - 1]), {"color": ["chain"]}
    return partial(_forest, tree=tree, rows=rows, title=title, var_names=names[:shown], aes=colours)


def _ranks(tree: DataTree, posterior: Dataset, site: str) -> Drawing:
    layer, rank = (str(dim) for dim in posterior[site].dims[-2:])
    chosen = posterior[layer].values[:: math.ceil(posterior[site][0, 0].size / _MOST_ROWS)].tolist()
    title = f"{site.removeprefix('size ')}: root mean square of the entries, by layer and rank"
    prior = _prior(tree, site)
    band = None if prior is None else np.quantile(prior, [0.025, 0.975]).tolist()
    title += "" if band is None else "\n(grey: 95 % of the prior)"
    rows = len(chosen) * posterior.sizes[rank]
    return partial(_forest, tree=tree, rows=rows, title=title, band=band, var_names=[site], coords={layer: chosen})


def _density(tree: DataTree, posterior: Dataset, site: str, layers: pd.DataFrame) -> Drawing:
    layer, rank = (str(dim) for dim in posterior[site].dims[-2:])
    kl = layers[layers["kind"] == _kind(site)].set_index("layer")["kl_per_number"].dropna()
    most = int(kl.idxmax()) if len(kl) else int(posterior[layer].values[-1])
    ranks = min(posterior.sizes[rank], _MOST_PANELS)
    options: dict[str, Any] = {"var_names": [site], "coords": {layer: [most], rank: list(range(ranks))}}
    title = f"{site.removeprefix('size ')}, layer {most}: root mean square of the entries of each rank"
    if _prior(tree, site) is None:
        return partial(_forest, tree=tree, rows=ranks, title=title, kind="plot_ridge", **options)
    options |= {"labeller": NoVarLabeller(), "col_wrap": 4, **_inches(11, 0.8 + 1.9 * math.ceil(ranks / 4))}
    title += ", against the prior (above each: layer, rank)"
    return lambda azp: _titled(azp.plot_prior_posterior(tree, backend="matplotlib", **options), title, right=0.9)


def _trace(tree: DataTree, posterior: Dataset) -> Drawing | None:
    names = [name for name in ("log score", "confidence") if name in posterior and _varies(posterior[name])]
    if not names:
        return None
    title = "held-out predictions of each draw, a colour for each run: independent draws show no trend, runs overlap"
    options = {"var_names": names, "backend": "matplotlib", **_inches(10, 3.6)}
    return lambda azp: _titled(azp.plot_trace(tree, **options), title)


def _khat(azp: Any, *, loo: ELPDData) -> Any:
    lines = {"hline_values": [float(loo.good_k)], "visuals": {"hlines": {"color": "#999999", "linestyle": "--"}}}
    drawn = azp.plot_khat(loo, backend="matplotlib", **_inches(9, 3.6), **lines)
    return _titled(drawn, f"Pareto k̂ of leaving out each training row; not to be trusted above {loo.good_k:.2f}")


def _forest(
    azp: Any,
    *,
    tree: DataTree,
    rows: int,
    title: str,
    band: list[float] | None = None,
    kind: str = "plot_forest",
    **options: Any,
) -> Any:
    drawn = getattr(azp, kind)(tree, backend="matplotlib", **_inches(9, 1.4 + 0.22 * rows), **options)
    if band is not None:
        drawn.viz["figure"].item().axes[-1].axvspan(*band, color="black", alpha=0.07, zorder=0)
    return _titled(drawn, title)


def _inches(wide: float, tall: float) -> dict[str, Any]:
    return {"figure_kwargs": {"figsize": (wide, tall), "figsize_units": "inches"}}


def _titled(drawn: Any, title: str, *, right: float = 1.0) -> Any:
    """A title close above whatever was drawn; ``right`` leaves room for a legend."""
    figure = drawn.viz["figure"].item()
    figure.set_layout_engine("none")
    figure.tight_layout(rect=(0, 0, right, 1))
    figure.canvas.draw()
    top = max(axes.get_tightbbox().y1 for axes in figure.axes) / figure.bbox.height
    figure.suptitle(title, fontsize=11, y=top + 0.1 / figure.get_figheight(), va="bottom")
    return drawn


def _site(posterior: Dataset, layers: pd.DataFrame) -> str | None:
    """The random site whose kind of module has the largest KL for each number."""
    names = [str(name) for name in posterior if str(name).startswith("size ") and _varies(posterior[name])]
    largest = layers.groupby("kind")["kl_per_number"].max()
    return max(names, key=lambda name: np.nan_to_num(largest.get(_kind(name), 0.0)), default=None)


def _prior(tree: DataTree, site: str) -> np.ndarray | None:
    there = "prior" in tree.children and site in tree["prior"].data_vars
    return tree["prior"].to_dataset()[site].values if there else None


def _kind(name: str) -> str:
    return name.removeprefix("size ").removeprefix("lora.").rsplit(".", 1)[0]


def _varies(values: Any) -> bool:
    return bool((values.max(("chain", "draw")) > values.min(("chain", "draw"))).any())
