"""Noise in activation space: its covariance against brute force over weight matrices, and its hooks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from pyrolora.adapters.noise import (
    Stack,
    _Local,
    bottleneck_noise,
    changed_outputs,
    require_linear,
)
from pyrolora.adapters.sites import AdapterError, SiteGroup, find_sites
from tests.conftest import ARCHITECTURES

EXAMPLES, TOKENS, OUT, IN = 3, 2, 2, 4
DRAWS = 20_000
KINDS = ("weight", "example", "local", "flipout")


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, TOKENS, IN, generator=generator)
    scale = torch.rand(OUT, IN, generator=generator) + 0.2
    return x, scale, torch.tensor([0.5, 1.0, 2.0])


def sampled(kind: str, x: Tensor, scale: Tensor, factor: Tensor | None) -> Tensor:
    """Draws of the noise of all rows and outputs in one vector, ``(DRAWS, rows · OUT)``."""
    one = torch.vmap(
        lambda _: bottleneck_noise(kind, x, scale, examples=EXAMPLES, factor=factor),  # type: ignore[arg-type]
        randomness="different",
    )
    return one(torch.zeros(DRAWS)).reshape(DRAWS, -1)


def brute_force(kind: str, x: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
    """The covariance by definition: of explicit weight matrices, shared between the rows that share them."""
    rows = x.reshape(-1, IN)
    owner = torch.arange(EXAMPLES).repeat_interleave(TOKENS)
    f = factor[owner]
    # cov(h_ti, h_uj) = δ_ij f_t f_u Σ_k σ_ik² x_tk x_uk for rows that see one ε, and zero for others.
    full = torch.einsum("t,u,ik,tk,uk->tiu", f, f, scale**2, rows, rows)
    same = {
        "weight": torch.ones(len(rows), len(rows)),
        "example": (owner[:, None] == owner[None]).float(),
        "local": torch.eye(len(rows)),
        "flipout": torch.eye(len(rows)),
    }[kind]
    return torch.einsum("tiu,tu,ij->tiuj", full, same, torch.eye(len(scale))).reshape(len(rows) * len(scale), -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_factor", [False, True])
def test_covariance_is_that_of_weight_draws(kind: str, with_factor: bool) -> None:
    """Law: within and between rows the noise has the covariance of weight matrices shared as the kind says."""
    x, scale, factor = inputs()
    with_ones = factor if with_factor else torch.ones(EXAMPLES)
    noise = sampled(kind, x, scale, factor if with_factor else None)
    exact = brute_force(kind, x, scale, with_ones)
    found = noise.T @ noise / DRAWS
    spread = exact.diagonal().sqrt()
    # The variance of a product of two Normals; flipout's, of one ε, are not Normal together: at most E z⁴.
    error = spread[:, None] * spread[None] * math.sqrt((3 if kind == "flipout" else 2) / DRAWS)
    assert ((found - exact).abs() < 5 * error).all()
    assert (noise.mean(0).abs() < 5 * spread / math.sqrt(DRAWS)).all()


def test_brute_force_itself() -> None:
    """Law: the covariance above is that of explicit random matrices, one for each example."""
    x, scale, factor = inputs()
    weights = factor[:, None, None] * scale * torch.randn(DRAWS, EXAMPLES, OUT, IN)
    noise = torch.einsum("seik,etk->seti", weights, x).reshape(DRAWS, -1)
    exact = brute_force("example", x, scale, factor)
    spread = exact.diagonal().sqrt()
    error = spread[:, None] * spread[None] * math.sqrt(2 / DRAWS)
    assert ((noise.T @ noise / DRAWS - exact).abs() < 5 * error).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_where_there_is_no_noise(kind: str) -> None:
    """Law: at σ = 0 or x = 0 the noise vanishes and its gradient is finite, where the root's is not."""
    x, scale, factor = inputs()
    x[0, 0], scale[0] = 0.0, 0.0
    leaves = [part.clone().requires_grad_() for part in (x, scale, factor)]
    noise = bottleneck_noise(kind, leaves[0], leaves[1], examples=EXAMPLES, factor=leaves[2])  # type: ignore[arg-type]
    assert noise[0, 0].abs().max() < 1e-14 and noise[..., 0].abs().max() < 1e-14
    noise.sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves if leaf.grad is not None)


def test_gradient_of_local_noise() -> None:
    """Law: its hand-written derivative is that of finite differences, in x and σ."""
    x, scale, _ = inputs()
    noise = torch.randn(EXAMPLES * TOKENS, OUT).double()
    leaves = [x.reshape(-1, IN).double().requires_grad_(), scale.double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, b: _Local.apply(a, a.detach().square(), b, noise)[0], leaves)


def test_flipout_has_fair_signs_of_its_own_for_each_row_and_output() -> None:
    """Law: of one row in many places the noise is one number for each output, by ±1 with probability ½, and the signs
    of no two outputs, and no two rows that follow one another, agree more often than chance."""
    rows, out = 4096, 24
    x = torch.randn(IN).expand(1, rows, IN)
    noise = bottleneck_noise("flipout", x, torch.rand(out, IN) + 0.2, examples=1)[0]
    assert torch.allclose(noise.abs(), noise[0].abs().expand_as(noise))
    signs = noise.sign()
    bound = 5 / rows**0.5
    assert signs.mean(0).abs().max() < bound
    assert (signs.T @ signs / rows - torch.eye(out)).abs().max() < bound
    assert (signs[1:] * signs[:-1]).mean(0).abs().max() < bound


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_of_a_row_is_normal(kind: str) -> None:
    """Law: seen alone, each row's noise is a Normal: its fourth moment is three times its variance's square."""
    x, scale, factor = inputs()
    noise = sampled(kind, x, scale, factor)
    variance = brute_force(kind, x, scale, factor).diagonal()
    # E z⁴ = 3, and E z⁸ = 105.
    assert ((noise**4).mean(0) / variance**2 - 3).abs().max() < 5 * (96 / DRAWS) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flipout_keeps_no_second_copy_of_its_input(dtype: torch.dtype) -> None:
    """Law: for the backward pass it keeps the module's input, in float32, which it is as a rule, no further tensor of
    its size."""
    x = torch.randn(EXAMPLES, TOKENS, 64).to(dtype).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        bottleneck_noise("flipout", x, torch.rand(OUT, 64).requires_grad_(), examples=EXAMPLES)
    added = {t.untyped_storage().data_ptr() for t in kept if t.numel() >= x.numel()} - {x.untyped_storage().data_ptr()}
    assert len(added) == (dtype != torch.float32)


def stacked(*, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Stack, dict[str, SiteGroup]]:
    """Over the queries, values and outputs of two layers, of ranks 2, 3 and 2; notes are of one pass."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=IN, num_hidden_layers=2, num_attention_heads=1, intermediate_size=6, pad_token_id=0
    )
    targets = ["q_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=OUT, rank_pattern={"v_proj": 3}, target_modules=targets, **options)
    model = get_peft_model(LlamaForSequenceClassification(config).to(dtype), lora)
    groups = {name: group for name, group in find_sites(model).items() if group.role == "A"}
    notes: dict[Any, Any] = {}
    return Stack(model, groups.values(), sigma, lambda: notes), groups


def sigma(name: str, layer: int) -> Tensor:
    """σ of a module."""
    return SIGMA[name][layer]


SIGMA = {
    f"lora.{kind}_proj.A": torch.rand(2, rank, IN, generator=torch.Generator().manual_seed(rank)) + 0.2
    for kind, rank in {"q": OUT, "v": 3, "o": OUT}.items()
}
Q, V, LAST = SIGMA


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reads_the_same", [True, False])
def test_modules_of_one_input_have_uncorrelated_noise(kind: str, reads_the_same: bool) -> None:
    """Law: stacked or not, each module's noise has the covariance of its own weight matrices, and no two modules'
    noise is correlated."""
    x, _, factor = inputs()
    others = x if reads_the_same else x.flip(0)
    stack, _ = stacked()

    def one(_: Tensor) -> tuple[Tensor, Tensor]:
        first = stack.noise(kind, x, Q, 0, examples=EXAMPLES, factor=factor)  # type: ignore[arg-type]
        second = stack.noise(kind, others, V, 0, examples=EXAMPLES, factor=factor.flip(0))  # type: ignore[arg-type]
        return first, second

    q, v = (noise.reshape(DRAWS, -1) for noise in torch.vmap(one, randomness="different")(torch.zeros(DRAWS)))
    bound = 5 * math.sqrt((3 if kind == "flipout" else 2) / DRAWS)
    spreads = []
    for noise, rows, name, f in ((q, x, Q, factor), (v, others, V, factor.flip(0))):
        exact = brute_force(kind, rows, sigma(name, 0), f)
        spread = exact.diagonal().sqrt()
        assert ((noise.T @ noise / DRAWS - exact).abs() < bound * spread[:, None] * spread).all()
        spreads.append(spread)
    assert ((q.T @ v / DRAWS).abs() < bound * spreads[0][:, None] * spreads[1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_noise_has_the_gradients_of_one_matrix(kind: str) -> None:
    """Law: given the draws, the noise and its derivatives in x and every σ are those of one matrix of all rows."""
    x, _, factor = inputs()
    scales = {name: sigma(name, 0).clone().requires_grad_() for name in (Q, V)}
    stack, _ = stacked()
    stack._scale = lambda name, _: scales[name] if name in scales else sigma(name, 0)
    found = []
    for together in (False, True):
        leaves = [x.clone().requires_grad_(), *scales.values()]
        options: dict[str, Any] = {"examples": EXAMPLES, "factor": factor}
        torch.manual_seed(0)
        if together:
            whole = torch.cat([stack.noise(kind, leaves[0], name, 0, **options) for name in scales], -1)  # type: ignore[arg-type]
        else:  # the outputs' rows too, which nobody takes
            every = torch.cat([*scales.values(), sigma(LAST, 0)])
            whole = bottleneck_noise(kind, leaves[0], every, **options)[..., :-OUT]  # type: ignore[arg-type]
        found.append((whole, *torch.autograd.grad(whole.square().sum(), leaves)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def draws_made(stack: Stack, *calls: tuple[Tensor, str, int]) -> list[bool]:
    """Whether each call drew anything."""
    made = []
    for x, name, layer in calls:
        before = torch.get_rng_state()
        noise = stack.noise("flipout", x, name, layer, examples=EXAMPLES)
        assert noise.shape == (EXAMPLES, TOKENS, len(sigma(name, layer)))
        made.append(not torch.equal(before, torch.get_rng_state()))
    return made


def test_a_stack_reads_its_input_once() -> None:
    """Law: noise is made once for modules that read one tensor, in whatever order they run, and anew for another
    tensor, another layer and the next run of the same module; no input or noise stays behind."""
    x, other = torch.randn(2, EXAMPLES, TOKENS, IN)
    stack, _ = stacked()
    assert draws_made(stack, (x, Q, 0), (x, V, 0), (other, LAST, 0)) == [True, False, True]
    assert draws_made(stack, (x, Q, 0), (x, V, 0), (other, LAST, 0)) == [True, False, True]  # the same again
    assert draws_made(stack, (x, Q, 0), (x, Q, 0), (x, Q, 1), (x, V, 0)) == [True, True, True, False]
    assert draws_made(stack, (x, V, 1), (x, V, 1), (x, Q, 1), (other, LAST, 1)) == [False, True, False, True]
    assert draws_made(stack, (other, LAST, 0)) == [True]
    assert stack._notes()[stack, stack._beside[LAST, 1]] == ({}, [])


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"dtype": torch.bfloat16}], ids=str)
def test_modules_that_read_copies_stand_alone(options: dict) -> None:
    """Law: where PEFT drops out or casts a layer's input no noise is made for others, for they read other tensors."""
    stack, groups = stacked(**options)
    assert not stack._beside and {group.dtype for group in groups.values()} == {torch.float32}
    x = torch.randn(EXAMPLES, TOKENS, IN)
    assert draws_made(stack, (x, Q, 0), (x, V, 0)) == [True, True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    """Law: the noise of a bfloat16 or float16 input is that of its float32 copy, under autocast too; squares of large
    float16 inputs do not overflow."""
    x, scale, factor = inputs()
    x = (300 * x).to(dtype)
    rows = []
    for value, automatic in ((x, False), (x.float(), False), (x, True)):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=automatic):
            rows.append(bottleneck_noise(kind, value, scale, examples=EXAMPLES, factor=factor))  # type: ignore[arg-type]
    assert all(torch.equal(row, rows[0]) and torch.isfinite(row).all() for row in rows)


def test_rows_of_no_example_are_refused() -> None:
    """Law: where rows cannot be divided among the examples, kinds that need to know whose they are say so."""
    x, scale, factor = torch.randn(7, IN), torch.rand(OUT, IN), torch.ones(3)
    with pytest.raises(ValueError, match=r'layer.query sees 7 rows for 3 examples.*noise="weight"'):
        bottleneck_noise("example", x, scale, examples=3, where="layer.query")
    with pytest.raises(ValueError, match="a module sees 7 rows"):
        bottleneck_noise("local", x, scale, examples=3, factor=factor)
    assert bottleneck_noise("local", x, scale, examples=3).shape == (7, OUT)


def test_changes_come_off() -> None:
    """Law: a change acts on a module's output inside the block, and is gone after it, also when the block fails."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    x = torch.randn(5, 4)
    plain = model(x)
    with pytest.raises(KeyError), changed_outputs(model, [("0", lambda inner, out: out * 0), ("1", lambda h, out: h)]):
        assert torch.equal(model(x), torch.zeros(5, 3))
        raise KeyError
    assert torch.equal(model(x), plain)


def test_what_runs_no_linear_module_is_refused() -> None:
    """Law: embeddings and expert parameters, whose lora_A is never called, are named in the error."""
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, pad_token_id=0
    )
    options = {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}
    model = get_peft_model(LlamaForSequenceClassification(config), LoraConfig(**options))
    sites = find_sites(model)
    require_linear(model, sites["lora.q_proj.A"], "noise", "leave it out")
    with pytest.raises(AdapterError, match="lora_embedding_A is not linear: noise cannot serve"):
        require_linear(model, sites["lora.embed_tokens.A"], "noise", "leave it out")
    experts = ARCHITECTURES["mixtral-experts"].inject()
    site = find_sites(experts)["lora.experts.down_proj.A"]
    with pytest.raises(AdapterError, match="expert parameters run no module: noise cannot serve"):
        require_linear(experts, site, "noise", "leave it out")
