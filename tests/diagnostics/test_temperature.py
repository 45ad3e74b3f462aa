from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize
from scipy.special import log_softmax, softmax

from pyrolora.diagnostics import calibration
from pyrolora.diagnostics.temperature import calibrate, fit_temperature, scale
from pyrolora.guides.ensemble import Ensemble
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.archive import ArchiveError, sealed, write_json
from pyrolora.inference.posterior import Posterior
from tests.programs import relabelled, sentence_task, tiny_bert, untrained


def world(temperature: float, *, n: int = 20_000, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log predictives whose labels follow softmax(logits) while the predictor reports softmax(temperature · logits)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    return log_softmax(temperature * logits, axis=1), labels


def nll(values, labels, temperature: float) -> float:
    return calibration.negative_log_likelihood(scale(values, temperature), labels)


def test_temperature_one_changes_nothing():
    """τ = 1 is the identity on a normalised log predictive."""
    values, _ = world(1.0, n=50)
    np.testing.assert_allclose(scale(values, 1.0), values, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.2, 3.0, 100.0])
def test_scaling_raises_probabilities_to_a_power(temperature):
    """p_τ ∝ p^{1/τ}, it sums to 1, and the order of classes stays."""
    values, _ = world(1.0, n=50)
    power = np.exp(values) ** (1 / temperature)
    np.testing.assert_allclose(np.exp(scale(values, temperature)), power / power.sum(1, keepdims=True), rtol=1e-10)
    assert (scale(values, temperature).argmax(1) == values.argmax(1)).all()


def test_zero_probabilities_stay_zero():
    """A class of probability 0 stays at 0, without NaN."""
    scaled = scale([[-math.inf, math.log(0.2), math.log(0.8)]], 2.0)
    np.testing.assert_allclose(np.exp(scaled), [[0.0, 1 / 3, 2 / 3]], atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_recovered(temperature):
    """Labels drawn at temperature 1 and a predictor sharpened by τ: the fit finds τ within sampling error."""
    assert fit_temperature(*world(temperature)) == pytest.approx(temperature, rel=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_agrees_with_the_root_of_the_gradient_and_a_grid(seed):
    """The minimum is where d NLL / d(1/τ) = E_τ[log p] − log p(y) averages to 0, and no grid point is lower."""
    values, labels = world(2.0, n=200, seed=seed)

    def gradient(inverse: float) -> float:
        return float((softmax(inverse * values, axis=1) * values).sum(1).mean() - values[np.arange(200), labels].mean())

    found = fit_temperature(values, labels)
    assert found == pytest.approx(1 / brentq(gradient, 1e-2, 10), rel=1e-4)
    assert min(nll(values, labels, math.exp(t)) for t in np.linspace(-3, 5, 161)) >= nll(values, labels, found) - 1e-12


def test_the_nll_is_convex_in_the_inverse_temperature():
    """NLL as a function of 1/τ has no negative second difference, so the search over log τ meets one valley."""
    values, labels = world(2.0, n=100)
    heights = [nll(values, labels, 1 / inverse) for inverse in np.linspace(0.05, 5, 100)]
    assert np.diff(heights, 2).min() > -1e-12
    slopes = np.sign(np.diff([nll(values, labels, math.exp(t)) for t in np.linspace(-3, 5, 100)]))
    assert (np.diff(slopes) >= 0).all()


def test_overconfident_predictors_are_flattened():
    """The gradient's sign: an over-confident predictor gets τ > 1, an under-confident one τ < 1, and the NLL falls."""
    for sharpness, flattened in ((2.0, True), (0.5, False)):
        values, labels = world(sharpness, n=2000)
        found = fit_temperature(values, labels)
        assert (found > 1) == flattened
        assert nll(values, labels, found) < nll(values, labels, 1.0)


def test_a_uniform_predictive_keeps_temperature_one():
    """Where every temperature is equally good, 1 is returned."""
    assert fit_temperature(np.full((5, 4), -math.log(4)), [0, 1, 2, 3, 0]) == 1.0


def test_separable_validation_data_stops_at_the_bound_with_a_warning(caplog):
    """If every label is the top class the optimum is τ → 0: the bound is returned and said."""
    with caplog.at_level(logging.WARNING, logger="pyrolora"):
        assert fit_temperature(np.log([[0.6, 0.4], [0.3, 0.7]]), [0, 1]) == pytest.approx(math.exp(-3), rel=1e-2)
    assert "bound" in caplog.text


def test_impossible_labels_and_bad_temperatures_are_refused():
    """A label of probability 0 cannot be repaired; temperatures are positive and finite."""
    with pytest.raises(ValueError, match="row 1 has probability 0"):
        fit_temperature([[0.0, -math.inf], [0.0, -math.inf]], [0, 1])
    with pytest.raises(ValueError, match="sum to"):
        fit_temperature([[1.0, 2.0]], [0])
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive finite"):
            scale([[0.0]], temperature)


@pytest.mark.parametrize("guide", [MAP(), MeanField(), Ensemble(MAP(), 2)], ids=lambda guide: type(guide).__name__)
def test_calibrating_scales_the_mean_predictive_of_any_posterior(guide):
    """Law: τ minimises the validation NLL of log p̄ / τ, as scipy's own minimiser finds it; draws stay as they are."""
    posterior, validation = untrained(guide), sentence_task().validation
    # Right five times in six, so that the best temperature is finite.
    labels = [int(k) ^ (i % 6 == 0) for i, k in enumerate(posterior.predict(validation, 4).log_mean.argmax(-1))]
    validation = validation.remove_columns("labels").add_column("labels", labels)
    calibrated = calibrate(posterior, validation, num_draws=4)
    before = posterior.predict(validation, 4)
    values, labels = before.log_mean.double().numpy(), before.labels.numpy()
    found = minimize(lambda x: nll(values, labels, math.exp(x[0])), x0=[0.0], method="Nelder-Mead", tol=1e-9)
    assert calibrated.scaling == pytest.approx(math.exp(found.x[0]), rel=1e-3) != 1.0
    after = calibrated.predict(validation, 4)
    np.testing.assert_allclose(after.log_mean, scale(values, calibrated.scaling), atol=1e-5)
    assert torch.equal(after.draws, before.draws) and torch.equal(after.variance, before.variance)
    assert posterior.scaling == 1.0 and calibrate(calibrated, validation, num_draws=4).scaling == calibrated.scaling


def test_a_prediction_at_temperature_one_is_itself():
    """Law: at τ = 1 every number of a prediction is bitwise the same; it is the same object."""
    prediction = untrained(MAP()).predict(sentence_task().test)
    assert prediction.scaled(1.0) is prediction


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_scaling_leaves_the_mutual_information(temperature):
    """Law: H[p_τ] = aleatoric + epistemic, and the epistemic part is that of the draws."""
    prediction = untrained(MeanField()).predict(sentence_task().test, 4)
    scaled = prediction.scaled(temperature)
    expected = torch.special.entr(torch.softmax(prediction.log_mean / temperature, -1)).sum(-1)
    torch.testing.assert_close(scaled.entropy, expected)
    torch.testing.assert_close(scaled.mutual_information, torch.minimum(prediction.mutual_information, expected))


def test_calibration_is_saved_with_the_posterior(tmp_path):
    """Law: a loaded posterior predicts at its temperature; older files have 1; only positive ones are read."""
    task = sentence_task()
    calibrated = calibrate(untrained(MAP()), task.validation)
    calibrated.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(tmp_path, tiny_bert(), task=task)
    assert loaded.scaling == calibrated.scaling
    assert torch.equal(loaded.predict(task.test).log_mean, calibrated.predict(task.test).log_mean)
    path = tmp_path / "posterior.json"
    meta = json.loads(path.read_text())
    write_json(path, sealed({name: value for name, value in meta.items() if name != "scaling"}))
    assert Posterior.from_pretrained(tmp_path, tiny_bert(), task=task).scaling == 1.0
    write_json(path, sealed({**meta, "scaling": -1.0}))
    with pytest.raises(ArchiveError, match="positive, not -1"):
        Posterior.from_pretrained(tmp_path, tiny_bert(), task=task)


def test_calibration_needs_labels():
    """Law: rows whose label is unknown are an error, not a term of the likelihood."""
    with pytest.raises(ValueError, match="label of every row"):
        calibrate(untrained(MAP()), relabelled(sentence_task().test, -1))
