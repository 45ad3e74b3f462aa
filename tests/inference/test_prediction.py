"""Predictions: the decomposition of uncertainty, its Monte Carlo error, streaming, and the tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torch import Tensor

from pyrolora.inference import prediction
from pyrolora.inference.prediction import Prediction, PredictionBuilder


def log_probabilities(num_draws: int, size: int, classes: int = 3, *, spread: float = 1.5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(1, size, classes, generator=generator)
    return (centre + spread * torch.randn(num_draws, size, classes, generator=generator)).log_softmax(-1)


def build(
    log_p: Tensor,
    *,
    batches: Sequence[Sequence[int]] | None = None,
    labels: list[int] | None = None,
    texts: list[str] | None = None,
    names: Sequence[str] = ("a", "b", "c"),
) -> Prediction:
    builder = PredictionBuilder(log_p.shape[1], log_p.shape[0], names)
    batches = batches or [range(log_p.shape[1])]
    for rows in batches:
        builder.add(log_p[:, list(rows)])
    columns = {name: value for name, value in (("labels", labels), ("text", texts)) if value is not None}
    return builder.build(torch.tensor([row for rows in batches for row in rows]), columns)


def test_decomposition_by_brute_force() -> None:
    """Law: total = H of the mean, aleatoric = mean of H, epistemic = their difference = mean KL from the mean."""
    log_p = log_probabilities(7, 5)
    result = build(log_p)
    p = log_p.exp().double().numpy()
    mean = p.mean(0)
    assert np.allclose(result.mean, mean, atol=1e-6)
    assert np.allclose(result.log_mean, np.log(mean), atol=1e-5)
    assert np.allclose(result.entropy, scipy_entropy(mean, axis=-1), atol=1e-5)
    assert np.allclose(result.expected_entropy, scipy_entropy(p, axis=-1).mean(0), atol=1e-5)
    divergence = scipy_entropy(p, np.broadcast_to(mean, p.shape), axis=-1).mean(0)
    assert np.allclose(result.mutual_information, divergence, atol=1e-5)
    assert np.allclose(result.variance, p.var(0, ddof=1), atol=1e-6)
    assert result.draws is not None and torch.equal(result.draws, log_p)
    assert result.num_draws == 7 and len(result) == 5


@pytest.mark.parametrize("spread", [0.0, 1e-4, 10.0])
def test_mutual_information_is_never_negative(spread: float) -> None:
    """Law: 0 ≤ I ≤ H ≤ log K, also where round-off would say otherwise; it is 0 where draws agree."""
    result = build(log_probabilities(9, 200, spread=spread))
    assert (result.mutual_information >= 0).all()
    assert (result.mutual_information <= result.entropy + 1e-5).all()
    assert (result.entropy <= math.log(3) + 1e-5).all()
    if spread == 0.0:
        assert result.mutual_information.max() < 1e-5
    if spread == 10.0:
        assert result.mutual_information.mean() > 0.3


def test_certain_classes_have_no_entropy() -> None:
    """Law: probabilities of exactly zero count nothing: no NaN, and disagreement alone is epistemic."""
    log_p = torch.tensor([[[0.0, -torch.inf]], [[-torch.inf, 0.0]]])
    result = build(log_p, names=("a", "b"))
    assert result.expected_entropy.item() == 0.0
    assert result.entropy.item() == pytest.approx(math.log(2))
    assert result.mutual_information.item() == pytest.approx(math.log(2))
    same = build(log_p[:1], names=("a", "b"))
    assert same.entropy.item() == 0.0 and same.log_mean.tolist() == [[0.0, -math.inf]]


def test_tiny_probabilities_keep_their_logarithm() -> None:
    """Law: the mixture's log probability is formed in logarithms: e^-300 is not rounded to zero."""
    log_p = torch.tensor([[[0.0, -300.0]], [[0.0, -301.0]]])
    result = build(log_p, names=("a", "b"))
    assert result.log_mean[0, 1].item() == pytest.approx(-300 + math.log((1 + math.exp(-1)) / 2), rel=1e-6)


def test_monte_carlo_error_by_repetition() -> None:
    """Law: √(variance/S) is the spread of the mean over repeated sets of S draws."""
    size, repeats = 8, 3000
    generator = torch.Generator().manual_seed(3)
    logits = torch.tensor([0.5, 0.0, -1.0]) + 1.2 * torch.randn(size, repeats, 3, generator=generator)
    # Every input is one repetition of the same experiment.
    result = build(logits.log_softmax(-1))
    spread = result.mean.std(0)
    stated = result.monte_carlo_error.square().mean(0).sqrt()
    assert torch.allclose(stated, spread, rtol=5 / math.sqrt(2 * repeats))
    assert torch.allclose(result.monte_carlo_error, (result.variance / size).sqrt())


def test_one_draw_has_no_variance() -> None:
    """Law: a single pass has variance zero, not NaN, and all its uncertainty is aleatoric."""
    result = build(log_probabilities(1, 4))
    assert (result.variance == 0).all() and (result.monte_carlo_error == 0).all()
    assert result.mutual_information.abs().max() < 1e-6


def test_rows_come_back_in_the_datas_order() -> None:
    """Law: batches in any order give what one batch gives."""
    log_p = log_probabilities(4, 6)
    whole = build(log_p, labels=[0, 1, 2, 0, 1, 2], texts=list("uvwxyz"))
    parts = build(log_p, batches=[[5, 0], [3, 1, 4], [2]], labels=[0, 1, 2, 0, 1, 2], texts=list("uvwxyz"))
    for name in ("log_mean", "entropy", "expected_entropy", "variance", "draws", "labels"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name), atol=1e-6), name
    assert whole.texts == parts.texts == tuple("uvwxyz")


def test_above_a_size_draws_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: S·n·K numbers are kept up to the limit; above it the draws go, and every summary stays the same."""
    log_p = log_probabilities(4, 6)
    kept = build(log_p, batches=[[0, 1], [2, 3, 4, 5]])
    monkeypatch.setattr(prediction, "KEPT_VALUES", 4 * 6 * 3)
    assert build(log_p, batches=[[0, 1], [2, 3, 4, 5]]).draws is not None
    # The limit is on the whole data set, so that a short batch does not slip under it.
    monkeypatch.setattr(prediction, "KEPT_VALUES", 4 * 6 * 3 - 1)
    streamed = build(log_p, batches=[[0, 1], [2, 3, 4, 5]])
    assert streamed.draws is None
    for name in ("log_mean", "entropy", "expected_entropy", "variance", "mutual_information", "monte_carlo_error"):
        assert torch.equal(getattr(kept, name), getattr(streamed, name)), name
    assert streamed.to_pandas().equals(kept.to_pandas())


def test_table() -> None:
    """Law: one row for each input: text, label by name (missing where unknown), prediction, uncertainties."""
    result = build(log_probabilities(4, 3), labels=[2, -1, 0], texts=["x", "y", "z"])
    table = result.to_pandas()
    columns = ["text", "label", "predicted", "confidence", "p(a)", "p(b)", "p(c)", "entropy", "mutual_information"]
    assert list(table.columns) == columns
    assert table["text"].tolist() == ["x", "y", "z"]
    assert table["label"].isna().tolist() == [False, True, False]
    assert table["label"].dropna().tolist() == ["c", "a"]
    best = result.mean.argmax(-1)
    assert table["predicted"].tolist() == ["abc"[k] for k in best.tolist()]
    assert np.allclose(table["confidence"], result.mean.amax(-1))
    assert np.allclose(table[["p(a)", "p(b)", "p(c)"]], result.mean)
    assert np.allclose(table["mutual_information"], result.mutual_information)
    assert np.allclose(table["entropy"], result.entropy)


def test_table_without_names_labels_or_texts() -> None:
    """Law: what the data do not have is left out, and classes without names are numbered."""
    table = build(log_probabilities(4, 3), names=()).to_pandas()
    assert list(table.columns) == ["predicted", "confidence", "p(0)", "p(1)", "p(2)", "entropy", "mutual_information"]
    assert set(table["predicted"]) <= {"0", "1", "2"}


def test_dataset_is_the_same_table() -> None:
    """Law: to_dataset has the table's columns and values, and no index column."""
    result = build(log_probabilities(4, 3), labels=[2, -1, 0], texts=["x", "y", "z"])
    data, table = result.to_dataset(), result.to_pandas()
    assert data.column_names == list(table.columns)
    assert data["label"][:] == ["c", None, "a"]
    assert np.allclose(data["entropy"][:], table["entropy"])


def test_html_escapes_texts_and_names() -> None:
    """Law: a text or class name from the data cannot become markup in a notebook; at most 20 rows are shown."""
    texts = ["<script>alert(1)</script>"] + [f"row {i}" for i in range(29)]
    shown = build(log_probabilities(2, 30), texts=texts, labels=[0] * 30, names=("<b>a", "b", "c"))._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;alert(1)" in shown
    assert "<b>" not in shown and "p(&lt;b&gt;a)" in shown
    assert "row 18" in shown and "row 19" not in shown and "20 of 30 rows" in shown


def test_repr_sums_up() -> None:
    """Law: one line with sizes and mean uncertainties in nats."""
    result = build(log_probabilities(4, 3))
    assert repr(result) == (
        f"Prediction(3 inputs, 3 classes, 4 draws; mean entropy {result.entropy.mean():.3f}, "
        f"mean mutual information {result.mutual_information.mean():.4f} nats)"
    )
    assert "4 quasi-Monte Carlo points;" in repr(dataclasses.replace(result, joint=False))


def test_half_precision_draws_are_summed_in_single() -> None:
    """Law: summaries are formed in float32 whatever the model's precision."""
    log_p = log_probabilities(16, 10)
    half = build(log_p.bfloat16())
    assert half.log_mean.dtype == half.variance.dtype == half.entropy.dtype == torch.float32
    assert torch.allclose(half.mean.sum(-1), torch.ones(10), atol=0.02)
