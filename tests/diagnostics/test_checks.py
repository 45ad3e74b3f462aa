"""Predictive checks: labels made anew, statistics by hand, predictors that are too sure or not sure enough."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyrolora.diagnostics.checks import (
    Predictive,
    can_be_checked,
    check,
    judge_posterior_check,
    judge_prior_check,
    posterior_predictive,
    prior_predictive,
)
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated, spawn
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.likelihoods.next_token import NextToken
from pyrolora.likelihoods.normal import Normal as NormalLikelihood
from pyrolora.priors.flat import Flat
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from pyrolora.tasks.sequence_classification import SequenceClassification
from tests.programs import lora, sentence_task, sentences, tiny_bert, tiny_program, tokenizer


def predictor(sure: float, *, spread: float = 0.0, seed: int = 0, draws: int = 50, classes: int = 3) -> Predictive:
    """Says ``softmax(sure · f + spread · ε_s)`` of labels that follow ``softmax(f)``."""
    rows = 400
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(rows, classes, generator=generator)
    labels = torch.multinomial(f.softmax(-1), 1, generator=generator).squeeze(-1)
    logits = sure * f + spread * torch.randn(draws, rows, classes, generator=generator)
    made = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).reshape(draws, rows)
    return Predictive(Categorical(classes), logits, [{}] * draws, labels, made)


def moved(guide: MeanField | MAP | Laplace, program: PyroLoRA | None = None) -> Posterior:
    program = program or tiny_program()
    with isolated(0), torch.no_grad():
        guide.bind(program)
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return Posterior(program, guide)


def test_statistics_by_hand() -> None:
    """Law: accuracy of the mean's favourite, mean log p̄(y), shares of classes; interval and z from the replicates."""
    predictive = predictor(1.0, spread=1.0, classes=4)
    table, p, y = check(predictive), predictive.probabilities().mean(0), predictive.labels
    assert list(table.index) == ["accuracy", "log score", *(f"share of {k}" for k in range(4))]
    assert table.loc["accuracy", "observed"] == pytest.approx(float((p.argmax(-1) == y).double().mean()))
    assert table.loc["log score", "observed"] == pytest.approx(float(p[range(len(y)), y].log().mean()), rel=1e-5)
    made = np.array([float((labels == 2).double().mean()) for labels in predictive.replicated])
    row = table.loc["share of 2"]
    assert row["expected"] == pytest.approx(made.mean()) and row["low"] == pytest.approx(np.quantile(made, 0.025))
    assert row["z"] == pytest.approx((float((y == 2).double().mean()) - made.mean()) / made.std(ddof=1))
    assert list(check(predictor(1.0, classes=2)).index) == ["accuracy", "log score", "share of 0"]


def test_calibrated_predictors_pass() -> None:
    """Law: for labels from the predictor's own law z is standard normal: over 40 data sets its mean square is 1."""
    squares = np.array([check(predictor(1.0, seed=s))["z"].to_numpy()[:2] ** 2 for s in range(40)])
    assert np.abs(squares.mean(0) - 1).max() < 4 * np.sqrt(2 / 40)
    assert judge_posterior_check(check(predictor(1.0)), 400, "validation").level == "fine"


@pytest.mark.parametrize(("sure", "word"), [(4.0, "overconfident"), (0.2, "underconfident")])
def test_directions(sure: float, word: str) -> None:
    """Law: sharper probabilities than the labels' are overconfident, flatter ones underconfident; both are bad."""
    found = judge_posterior_check(check(predictor(sure)), 400, "validation")
    assert found.level == "bad" and word in found.words and found.advice


def test_posterior_predictive_is_the_posteriors() -> None:
    """Law: log p(y|θ_s), probabilities and labels are those of the same draws of the posterior."""
    posterior, data = moved(MeanField()), sentence_task().validation
    assert data is not None
    predictive = posterior_predictive(posterior, data, 40, seed=2)
    rows = posterior.log_likelihood(data, 40, seed=2)
    assert np.allclose(predictive.log_prob(predictive.labels), rows, atol=1e-5)
    expected = posterior.predict(data, 40, seed=2).mean
    assert np.allclose(predictive.probabilities().mean(0), expected, atol=1e-5)
    assert np.allclose(predictive.log_score(predictive.labels), rows.logsumexp(0) - np.log(40), atol=1e-5)
    assert (predictive.replicated.double().mean(0) - expected[:, 1]).abs().max() < 4 * np.sqrt(0.25 / 40)
    point = posterior_predictive(moved(MAP()), data, 30)
    assert point.replicated.shape == (30, 16) and len(point.replicated.unique(dim=0)) > 1


def test_rows_of_linearised_predictions_are_independent() -> None:
    """Law: marginals of each row share their quadrature points, which no world does: replicates must not. Joint
    draws are one world each."""
    assert all(moved(guide).guide.joint_draws for guide in (MeanField(), Laplace(predictive="joint")))
    posterior, data = moved(Laplace()), sentence_task().validation
    posterior.guide.post_fit(posterior.program, posterior.program.task.train)  # type: ignore[union-attr]
    with torch.no_grad():
        for name, value in posterior.guide.named_buffers():
            if name.startswith(("values:", "remainder:", "small_values:", "precision:")):
                value.fill_(1e-2 if name.startswith("precision") else 0.0)
    assert data is not None and not posterior.guide.joint_draws
    predictive = posterior_predictive(posterior, data, 4)
    share = predictive.replicated.double().mean(1)
    p = predictive.probabilities()[:, :, 1].mean(0).double()
    assert float(share.var()) == pytest.approx(float((p * (1 - p)).sum()) / len(p) ** 2, rel=0.4)


def test_prior_predictive() -> None:
    """Law: each draw is one draw of the prior for all rows, whatever the batches; flat sites stand at their start."""
    program = tiny_program({"*.A": Normal(1.0), "*.B": Flat(), "head.*": Normal(1.0)})
    data = sentence_task().test
    assert data is not None
    more = data.select([*range(12)] * 3)
    predictive = prior_predictive(program, more, 3, seed=4)
    start = {name: latent.start for name, latent in program.latents.items() if latent.flat}
    batch = sentence_task().collate([data.remove_columns("text")[i] for i in range(12)])
    for s in range(3):
        with isolated(spawn(4, s)), torch.no_grad():
            draws, _ = poutine.condition(program.sample_latents, data=start)()
            logits = program.logits(draws, batch)
        for k in range(3):
            assert torch.allclose(predictive.logits[s, 12 * k : 12 * k + 12], logits, atol=1e-5)


def regression() -> PyroLoRA:
    rows = sentences(40).map(lambda row: {"label": float(row["label"])})
    task = SequenceClassification(tokenizer(), train=rows, regression=True, max_length=16)
    with isolated(0):
        return PyroLoRA(
            tiny_bert(labels=1),
            lora(),
            priors={"*.A": Normal(1.0), "*.B": Normal(0.1), "head.*": Normal(1.0)},
            task=task,
        )


def test_regression() -> None:
    """Law: a learnt noise scale enters density and labels; mean and standard deviation are checked."""
    program = regression()
    posterior = moved(MeanField(random="*"), program)
    data = program.task.train  # type: ignore[union-attr]
    predictive = posterior_predictive(posterior, data, 30)
    assert np.allclose(predictive.log_prob(predictive.labels), posterior.log_likelihood(data, 30), atol=1e-4)
    noise = predictive.replicated - predictive.logits
    scale = posterior.draw(30)[NormalLikelihood.scale_site]
    assert float((noise / scale[:, None]).std()) == pytest.approx(1.0, abs=0.1)
    table = check(predictive)
    assert list(table.index) == ["mean", "standard deviation", "log score"]
    assert table.loc["mean", "observed"] == pytest.approx(np.mean(data["labels"]))
    assert judge_prior_check(prior_predictive(program, data, 20), table, []).numbers


def said(scale: float, labels: Tensor | None = None) -> str:
    program = tiny_program({"*.A": Normal(0.1), "*.B": Flat(), "head.*": Normal(scale)})
    data = sentence_task().validation
    assert data is not None
    if labels is not None:
        data = data.remove_columns("labels").add_column("labels", labels.tolist())
    predictive = prior_predictive(program, data, 25)
    found = judge_prior_check(predictive, check(predictive), ["lora.query.B"])
    return f"{found.level}: {found.words} {found.advice}"


def test_priors_that_say_too_much_or_what_is_not_so() -> None:
    """Law: a prior that is sure of everything, and labels that it cannot make, are said; a moderate one is fine."""
    moderate, sure = said(1.0), said(300.0)
    assert moderate.startswith("fine") and "Flat at lora.query.B" in moderate
    assert sure.startswith("look") and "sure of everything" in sure
    conflict = said(1e-4, torch.ones(16, dtype=torch.long))
    assert conflict.startswith("look") and "prior–data conflict" in conflict and "share of" in conflict


def test_what_cannot_be_checked() -> None:
    """Law: texts are not made anew; unknown labels are refused."""
    assert not can_be_checked(NextToken()) and can_be_checked(Categorical(2)) and can_be_checked(NormalLikelihood())
    data = sentence_task().test
    assert data is not None
    unknown = data.remove_columns("labels").add_column("labels", [-1] * 12)
    with pytest.raises(ValueError, match="12 of 12 rows have no known label"):
        posterior_predictive(moved(MAP()), unknown, 30)
