"""The program is an ordinary Pyro model: traced, replayed, conditioned, sampled by NUTS, its density by hand."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive
from torch import Tensor

from pyrolora.program import PyroLoRA
from tests.programs import linear_gaussian, tiny_program

ADAPTERS = [f"lora.{kind}.{role}" for kind in ("query", "value") for role in "AB"]
HEAD = ["head.classifier.weight", "head.classifier.bias"]


def rows(program: PyroLoRA, start: int = 0, stop: int = 24) -> dict[str, Tensor]:
    assert program.task is not None and program.task.train is not None
    return program.task.collate([program.task.train[i] for i in range(start, stop)])


def test_trace_has_every_site_in_its_plates() -> None:
    """Law: a trace holds each adapter site under its plate over layers, and the labels under the data plate."""
    program = tiny_program()
    nodes = poutine.trace(program).get_trace(rows(program, 0, 6)).nodes
    assert [n for n, node in nodes.items() if node["type"] == "sample" and n in program.latents] == ADAPTERS + HEAD
    for name, site in program.sites.items():
        (frame,) = nodes[name]["cond_indep_stack"]
        assert (frame.name, frame.size) == (site.plate, site.num_layers)
        assert nodes[name]["fn"].batch_shape == (site.num_layers,)
        assert nodes[name]["scale"] == 1.0
    assert nodes["lora.query.A"]["cond_indep_stack"] == nodes["lora.query.B"]["cond_indep_stack"]
    assert nodes["lora.query.A"]["fn"].event_shape == (2, 16)
    (frame,) = nodes["labels"]["cond_indep_stack"]
    assert (frame.name, frame.size) == ("data", 6)
    assert nodes["labels"]["is_observed"]


@pytest.mark.parametrize("size", [1, 6, 24, 30])
def test_a_minibatch_counts_as_the_whole_data(size: int) -> None:
    """Law: the data site's scale is N/b for every batch size b, also for one larger than N (another split)."""
    program = tiny_program()
    batch = (
        rows(program) if size <= 24 else program.task.collate(list(program.task.train) + [program.task.train[0]] * 6)
    )
    batch = {name: value[:size] for name, value in batch.items()}
    assert poutine.trace(program).get_trace(batch).nodes["labels"]["scale"] == pytest.approx(24 / size)


def test_minibatches_average_to_the_whole() -> None:
    """Law: at one draw, the log joint averaged over all minibatches of a partition is that of the whole data."""
    program = tiny_program()
    program.model.eval()
    with poutine.block(), torch.no_grad():
        draws, _ = program.sample_latents()
        fixed = poutine.condition(program, data=draws)
        whole = poutine.trace(fixed).get_trace(rows(program)).log_prob_sum()
        parts = [poutine.trace(fixed).get_trace(rows(program, i, i + 6)).log_prob_sum() for i in range(0, 24, 6)]
    assert torch.stack(parts).mean() == pytest.approx(whole.item(), rel=1e-5)
    assert torch.stack(parts).std() > 1e-3


def test_log_joint_by_hand() -> None:
    """Law: log p(y, θ) is the Normal log densities plus the log-softmax of the base model at θ."""
    program = tiny_program()
    program.model.eval()
    batch = rows(program, 0, 6)
    with torch.no_grad():
        trace = poutine.trace(program).get_trace(batch)
        scales = {"lora.query.A": 0.25, "lora.value.A": 0.25, "lora.query.B": 0.1, "lora.value.B": 0.1}
        draws = {name: trace.nodes[name]["value"] for name in program.latents}
        prior = sum(
            -0.5 * ((v / s) ** 2).sum() - v.numel() * (math.log(s) + 0.5 * math.log(2 * math.pi))
            for v, s in ((value, scales.get(name, 1.0)) for name, value in draws.items())
        )
        # The adapters written into the parameters themselves, with PEFT's forward pass as the truth.
        for name, site in program.sites.items():
            for (path, parameter), layer in zip(site.holders, draws[name], strict=True):
                program.model.get_submodule(path).get_parameter(parameter).copy_(layer)
        logits = program.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        data = logits.log_softmax(-1).gather(-1, batch["labels"].unsqueeze(-1)).sum() * 24 / 6
    assert trace.log_prob_sum().item() == pytest.approx(float(prior + data), rel=1e-5)


def test_without_labels_the_data_site_is_sampled() -> None:
    """Law: a batch without labels samples them from the likelihood, within the support."""
    program = tiny_program()
    batch = {name: value for name, value in rows(program).items() if name != "labels"}
    node = poutine.trace(program).get_trace(batch).nodes["labels"]
    assert not node["is_observed"]
    assert node["value"].shape == (24,) and set(node["value"].tolist()) <= {0, 1}


def test_replay_reuses_the_draws() -> None:
    """Law: replayed against a trace the program takes its values, and gives its logits."""
    program = tiny_program()
    program.model.eval()
    batch = rows(program, 0, 6)
    first = poutine.trace(program).get_trace(batch)
    again = poutine.trace(poutine.replay(program, trace=first)).get_trace(batch)
    fresh = poutine.trace(program).get_trace(batch)
    assert all(again.nodes[name]["value"] is first.nodes[name]["value"] for name in program.latents)
    assert torch.equal(again.nodes["_RETURN"]["value"], first.nodes["_RETURN"]["value"])
    assert not torch.allclose(fresh.nodes["_RETURN"]["value"], first.nodes["_RETURN"]["value"])


def test_condition_observes_a_site() -> None:
    """Law: a conditioned site is observed at the given value, reaches the base model, and counts its log density."""
    program = tiny_program()
    program.model.eval()
    batch = rows(program, 0, 6)
    value = torch.full(program.latents["lora.value.B"].shape, 0.3)
    nodes = poutine.trace(poutine.condition(program, data={"lora.value.B": value})).get_trace(batch).nodes
    assert nodes["lora.value.B"]["is_observed"]
    density = dist.Normal(0.0, 0.1).log_prob(value).sum((-2, -1))
    assert torch.allclose(nodes["lora.value.B"]["fn"].log_prob(nodes["lora.value.B"]["value"]), density)
    draws = {name: nodes[name]["value"] for name in program.latents}
    with torch.no_grad():
        assert torch.allclose(program.logits({**draws, "lora.value.B": value}, batch), nodes["_RETURN"]["value"])
        assert not torch.allclose(program.logits({**draws, "lora.value.B": -value}, batch), nodes["_RETURN"]["value"])


def test_predictive_takes_posterior_samples() -> None:
    """Law: Pyro's Predictive runs on it, from given draws and from the prior, with a row for every draw."""
    program = tiny_program()
    program.model.eval()
    batch = {name: value for name, value in rows(program, 0, 6).items() if name != "labels"}
    samples = {name: torch.randn(3, *latent.shape) for name, latent in program.latents.items()}
    out = Predictive(program, posterior_samples=samples, return_sites=("labels", "_RETURN"))(batch)
    assert out["labels"].shape == (3, 6)
    with torch.no_grad():
        expected = torch.stack([program.logits({n: v[s] for n, v in samples.items()}, batch) for s in range(3)])
    assert torch.allclose(out["_RETURN"], expected, atol=1e-6)
    prior = Predictive(program, num_samples=4)(batch)
    assert prior["labels"].shape == (4, 6)
    assert prior["lora.query.A"].shape == (4, 2, 2, 16)


def test_nuts_finds_the_exact_posterior() -> None:
    """Law: NUTS on the program samples the exact linear-Gaussian posterior of A, B being known."""
    truth = linear_gaussian(rank=1, outputs=1)
    known = truth.program.latents["lora.linear.B"].start
    model = poutine.condition(truth.program, data={"lora.linear.B": known})
    mcmc = MCMC(NUTS(model, max_tree_depth=4), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run(truth.batch)
    draws = mcmc.get_samples()["lora.linear.A"].flatten(1)
    exact = truth.covariance.diagonal().sqrt()
    # About as many effective draws as draws; four and a half standard errors.
    error = 4.5 / math.sqrt(250)
    assert ((draws.mean(0) - truth.mean).abs() < error * exact).all()
    spread = exact.unsqueeze(0) * exact.unsqueeze(1)
    assert ((torch.cov(draws.T) - truth.covariance).abs() < math.sqrt(2) * error * spread).all()
