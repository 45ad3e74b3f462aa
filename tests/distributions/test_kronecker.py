"""The low-rank Kronecker Normal against dense multivariate Normals."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyrolora.distributions.kronecker import LowRankKroneckerNormal

LARGE, SMALL, LAYERS = 5, 3, 2  # a random orthogonal 2 × 2 matrix may be its own transpose: 3 tells Q from Qᵀ
RANKS = [0, 2, LARGE]
# None, some and all of the directions of the large side; with and without what is spread over the others.
CASES = [(rank, remainder, flip) for rank in RANKS for remainder in (0.0, 0.7) for flip in (False, True)]
EVERY_CASE = pytest.mark.parametrize(("rank", "remainder", "transposed"), CASES)


def array(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positive(*shape: int, seed: int) -> Tensor:
    return array(*shape, seed=seed).abs() + 0.1


def orthonormal(*shape: int, seed: int) -> Tensor:
    return torch.linalg.qr(array(*shape, seed=seed)).Q


def parameters(rank: int, remainder: float, *batch: int, large: int = LARGE) -> dict[str, Tensor]:
    return {
        "basis": orthonormal(*batch, large, rank, seed=1),
        "values": 3 * positive(*batch, rank, seed=2),
        "remainder": remainder * positive(*batch, seed=3),
        "small_basis": orthonormal(*batch, SMALL, SMALL, seed=4),
        "small_values": positive(*batch, SMALL, seed=5),
        "precision": positive(*batch, seed=6),
    }


def example(rank: int, remainder: float, transposed: bool, *batch: int) -> LowRankKroneckerNormal:
    batch = batch or (LAYERS,)
    event = (SMALL, LARGE) if transposed else (LARGE, SMALL)
    return LowRankKroneckerNormal(
        array(*batch, *event, seed=7), **parameters(rank, remainder, *batch), transposed=transposed
    )


def vec(value: Tensor, q: LowRankKroneckerNormal) -> Tensor:
    """Rows of the matrix with its large side first."""
    return (value.mT if q.transposed else value).flatten(-2)


def dense(q: LowRankKroneckerNormal) -> MultivariateNormal:
    """The same law with its precision written out as the definition has it, layer by layer."""
    large = LARGE
    each = []
    for layer in range(LAYERS):
        u, beta, rho = q.basis[layer], q.values[layer], q.remainder[layer]
        eye = torch.eye(large, dtype=u.dtype)
        first = u @ torch.diag(beta - rho) @ u.T + rho * eye
        second = q.small_basis[layer] @ torch.diag(q.small_values[layer]) @ q.small_basis[layer].T
        precision = torch.eye(large * SMALL, dtype=u.dtype) * q.precision[layer]
        each.append(precision + torch.kron(first, second))
    return MultivariateNormal(vec(q.loc, q), precision_matrix=torch.stack(each))


@EVERY_CASE
def test_log_prob_is_that_of_the_multivariate_normal(rank, remainder, transposed):
    """Law: log p(X) is that of N(vec M, P⁻¹) with P dense, for several values and layers at once."""
    q = example(rank, remainder, transposed)
    value = array(4, *q.loc.shape, seed=8)
    assert q.batch_shape == (LAYERS,) and q.event_shape == ((SMALL, LARGE) if transposed else (LARGE, SMALL))
    torch.testing.assert_close(q.log_prob(value), dense(q).log_prob(vec(value, q)))


@EVERY_CASE
def test_moments_are_those_of_the_multivariate_normal(rank, remainder, transposed):
    """Law: mean, elementwise variance, entropy and log-determinant are those of N(vec M, P⁻¹)."""
    q = example(rank, remainder, transposed)
    explicit = dense(q)
    torch.testing.assert_close(q.mean, q.loc)
    assert q.variance.shape == q.loc.shape
    torch.testing.assert_close(vec(q.variance, q), explicit.variance)
    torch.testing.assert_close(q.entropy(), explicit.entropy())
    torch.testing.assert_close(q.log_det_precision(), torch.logdet(explicit.precision_matrix))
    torch.testing.assert_close(q.log_det_ratio(), torch.logdet(explicit.precision_matrix / q.precision[:, None, None]))


@EVERY_CASE
def test_draws_have_the_stated_mean_and_covariance(rank, remainder, transposed):
    """Law: the empirical mean and covariance of vec X are vec M and P⁻¹ within five Monte Carlo errors."""
    q, n = example(rank, remainder, transposed), 20_000
    draws = vec(q.rsample(torch.Size([n])), q)
    true, explicit = dense(q).covariance_matrix, dense(q)
    assert draws.shape == (n, LAYERS, LARGE * SMALL)
    assert bool(((draws.mean(0) - explicit.mean).abs() < 5 * (explicit.variance / n).sqrt()).all())
    centred = draws - draws.mean(0)
    found = torch.einsum("sli,slj->lij", centred, centred) / n
    spread = explicit.variance
    error = ((spread.unsqueeze(-1) * spread.unsqueeze(-2) + true.square()) / n).sqrt()
    assert bool(((found - true).abs() < 5 * error).all())


@EVERY_CASE
def test_covariance_of_outputs(rank, remainder, transposed):
    """Law: outputs J vec X have covariance J P⁻¹ Jᵀ, with examples, without them, and for one unbatched matrix."""
    q = example(rank, remainder, transposed)
    jacobian = array(LAYERS, 4, 3, *q.event_shape, seed=9)
    flat = vec(jacobian, q)
    true = torch.einsum("lnai,lij,lnbj->lnab", flat, dense(q).covariance_matrix, flat)
    torch.testing.assert_close(q.covariance_of(jacobian), true)
    torch.testing.assert_close(q.covariance_of(jacobian[:, 1]), true[:, 1])
    single = {name: value[1] for name, value in parameters(rank, remainder, LAYERS).items()}
    alone = LowRankKroneckerNormal(q.loc[1], **single, transposed=transposed)
    torch.testing.assert_close(alone.covariance_of(jacobian[1]), true[1])
    repeated = q.expand([2, LAYERS]).covariance_of(jacobian.expand(2, *jacobian.shape))
    torch.testing.assert_close(repeated, true.expand(2, *true.shape))


@pytest.mark.parametrize("transposed", [False, True])
def test_covariance_of_outputs_is_that_of_draws(transposed):
    """Law: the covariance of outputs is the one that draws of the matrix have, within five Monte Carlo errors."""
    q, n = example(2, 0.7, transposed), 40_000
    jacobian = array(LAYERS, 3, *q.event_shape, seed=9)
    outputs = torch.einsum("lkab,slab->slk", jacobian, q.rsample(torch.Size([n])))
    centred = outputs - outputs.mean(0)
    found, true = torch.einsum("sli,slj->lij", centred, centred) / n, q.covariance_of(jacobian)
    spread = true.diagonal(dim1=-2, dim2=-1)
    error = ((spread.unsqueeze(-1) * spread.unsqueeze(-2) + true.square()) / n).sqrt()
    assert bool(((found - true).abs() < 5 * error).all())


def test_covariance_of_outputs_keeps_small_variances():
    """Law: in float32, outputs that curvature 10⁸ times the prior's determines have a variance that is positive and
    right to 1 part in 10⁴, where a difference of the prior's variance and what the data take away would be noise."""
    wide = 400
    given = {**parameters(3, 0.0, large=wide), "precision": torch.tensor(1e-3).double()}
    given["values"], given["small_values"] = torch.full((3,), 1e5).double(), torch.ones(SMALL).double()
    jacobian = torch.einsum("dk,nkr->ndr", given["basis"], array(6, 3, SMALL, seed=11))
    results = []
    for dtype in (torch.float32, torch.float64):
        q = LowRankKroneckerNormal(torch.zeros(wide, SMALL, dtype=dtype), **{k: v.to(dtype) for k, v in given.items()})
        found = q.covariance_of(jacobian.to(dtype)).diagonal()
        assert found.dtype == dtype and bool((found > 0).all())
        results.append(found.double())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=0)


@EVERY_CASE
def test_effective_dimension(rank, remainder, transposed):
    """Law: γ = Σ (1 − λ/eigenvalue) = dr − λ tr P⁻¹."""
    q = example(rank, remainder, transposed)
    trace = dense(q).covariance_matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(q.effective_dimension(), LARGE * SMALL - q.precision * trace)


def test_effective_dimension_keeps_weak_directions():
    """Law: in float32, curvature far below the prior's precision is counted, not rounded away."""
    given = {name: value.float() for name, value in parameters(2, 0.7).items()}
    q = LowRankKroneckerNormal(torch.zeros(LARGE, SMALL), **{**given, "precision": torch.tensor(1e12)})
    large = given["values"].sum() + (LARGE - 2) * given["remainder"]
    torch.testing.assert_close(1e12 * q.effective_dimension(), large * given["small_values"].sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["one", "each layer", "elementwise", "one matrix"])
@EVERY_CASE
def test_divergence_from_a_normal_prior(rank, remainder, transposed, kind):
    """Law: KL(q ‖ N(m, s²)) is the multivariate Normals' closed form, whatever s varies over, and also where the prior
    of one matrix is that of every layer."""
    q = example(rank, remainder, transposed)
    matrix = q.event_shape if kind == "one matrix" else q.loc.shape
    shape = {"one": (), "each layer": (LAYERS, 1, 1)}.get(kind, matrix)
    prior = dist.Normal(array(*matrix, seed=13), positive(*shape, seed=12).expand(matrix)).to_event(2)
    explicit = MultivariateNormal(vec(prior.mean, q), torch.diag_embed(vec(prior.variance, q)))
    torch.testing.assert_close(kl_divergence(q, prior), kl_divergence(dense(q), explicit))


def test_divergence_is_exact_in_single_precision():
    """Law: where data say next to nothing, the KL of a large float32 matrix has float64's value, near 0, not noise."""
    wide, results = 30_000, []
    for dtype in (torch.float32, torch.float64):
        given = {name: value.to(dtype) for name, value in parameters(2, 1e-2, large=wide).items()}
        q = LowRankKroneckerNormal(torch.zeros(wide, SMALL, dtype=dtype), **{**given, "precision": 4.0})
        prior = dist.Normal(torch.zeros((), dtype=dtype), 0.5).expand([wide, SMALL]).to_event(2)
        results.append(kl_divergence(q, prior).double())
    assert 0 < results[1] < 1
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=5e-3)


def test_without_curvature_it_is_the_prior():
    """Law: at β = ρ = 0 it is N(M, I/λ): no divergence from that prior and no effective dimension."""
    q = LowRankKroneckerNormal(torch.zeros(LARGE, SMALL).double(), **{**parameters(0, 0.0), "precision": 4.0})
    prior = dist.Normal(torch.zeros(LARGE, SMALL).double(), 0.5).to_event(2)
    value = array(6, LARGE, SMALL, seed=14)
    torch.testing.assert_close(q.log_prob(value), prior.log_prob(value))
    assert abs(kl_divergence(q, prior)) < 1e-12 and q.effective_dimension() == 0 and q.log_det_ratio() == 0


def test_other_priors_are_left_to_sampling():
    """Law: no closed form is claimed for what is not an elementwise Normal over matrices."""
    q = example(2, 0.7, False)
    for prior in (
        dist.Laplace(torch.zeros_like(q.loc), 1.0).to_event(2),
        dist.Normal(torch.zeros_like(q.loc), 1.0).to_event(1),
    ):
        with pytest.raises(NotImplementedError):
            kl_divergence(q, prior)


@EVERY_CASE
def test_another_precision_keeps_the_curvature(rank, remainder, transposed):
    """Law: under another λ, for each layer or for all, only λI changes in P, and no tensor is made anew."""
    q = example(rank, remainder, transposed)
    value = array(*q.loc.shape, seed=8)
    for other in (torch.tensor([0.01, 30.0], dtype=torch.float64), 2.5):
        tuned = q.with_precision(other)
        assert all(getattr(tuned, name) is getattr(q, name) for name in ("basis", "values", "remainder", "small_basis"))
        shift = (torch.as_tensor(other) - q.precision).expand(LAYERS)[:, None, None]
        shifted = dense(q).precision_matrix + shift * torch.eye(LARGE * SMALL, dtype=torch.float64)
        explicit = MultivariateNormal(vec(q.loc, q), precision_matrix=shifted)
        torch.testing.assert_close(tuned.log_prob(value), explicit.log_prob(vec(value, q)))
    with pytest.raises(ValueError, match="precision is 0"):
        q.with_precision(0.0)


@pytest.mark.parametrize("transposed", [False, True])
def test_expand_repeats(transposed):
    """Law: expand gives independent copies: the same law for each, and other draws for each."""
    q = example(2, 0.7, transposed)
    wide = q.expand([4, LAYERS])
    value = array(4, *q.loc.shape, seed=8)
    assert wide.batch_shape == (4, LAYERS) and wide.event_shape == q.event_shape
    torch.testing.assert_close(wide.log_prob(value), q.log_prob(value))
    for quantity in ("variance", "mean"):
        torch.testing.assert_close(getattr(wide, quantity), getattr(q, quantity).expand(4, *q.loc.shape))
    for method in ("entropy", "log_det_precision", "log_det_ratio", "effective_dimension"):
        torch.testing.assert_close(getattr(wide, method)(), getattr(q, method)().expand(4, LAYERS))
    draw = wide.rsample(torch.Size([2]))
    assert draw.shape == (2, *value.shape) and draw.flatten(0, 2).unique(dim=0).shape[0] == 8 * LAYERS


def test_arguments_broadcast_over_layers():
    """Law: what has no batch shape, or is a number, is the same for every layer."""
    common = parameters(2, 0.7)
    precision = positive(LAYERS, seed=6)
    q = LowRankKroneckerNormal(array(LARGE, SMALL, seed=7), **{**common, "precision": precision, "remainder": 0.3})
    value = array(LAYERS, LARGE, SMALL, seed=8)
    assert q.batch_shape == (LAYERS,) and q.rsample().shape == value.shape
    each = [
        LowRankKroneckerNormal(q.loc[i], **{**common, "precision": precision[i], "remainder": 0.3})
        for i in range(LAYERS)
    ]
    torch.testing.assert_close(
        q.log_prob(value), torch.stack([e.log_prob(v) for e, v in zip(each, value, strict=True)])
    )
    torch.testing.assert_close(q.entropy(), torch.stack([e.entropy() for e in each]))


def test_it_is_a_pyro_site():
    """Law: sampled in a plate of layers it is one site whose log density is the layers' sum."""
    q = example(2, 0.7, True)

    def model():
        with pyro.plate("layers", LAYERS):
            return pyro.sample("x", q)

    trace = pyro.poutine.trace(model).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), q.log_prob(trace.nodes["x"]["value"]).sum())


@EVERY_CASE
def test_gradients_are_right(rank, remainder, transposed):
    """Law: draws, density and divergence have the gradients of finite differences in mean, β, ρ, σ and λ."""
    q = example(rank, remainder, transposed)
    value = array(*q.loc.shape, seed=8)
    prior = dist.Normal(torch.zeros_like(q.loc), 0.5).to_event(2)
    # Steps of finite differences leave ρ = 0 to both sides, which is no valid distribution but a valid function.
    names = ("loc", "values", "remainder", "small_values", "precision")

    def quantities(*given: Tensor) -> tuple[Tensor, ...]:
        arguments = {**parameters(rank, remainder, LAYERS), **dict(zip(names, given, strict=True))}
        fn = LowRankKroneckerNormal(**arguments, transposed=transposed, validate_args=False)
        torch.manual_seed(0)
        return fn.rsample(), fn.log_prob(value), kl_divergence(fn, prior), fn.variance

    inputs = [getattr(q, name).clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(quantities, inputs, fast_mode=True)


def test_gradients_are_finite_without_curvature():
    """Law: where β, ρ and σ are all 0, in float32, every gradient is finite."""
    given = {name: value.float() for name, value in parameters(2, 0.0, LAYERS).items()}
    names = ("values", "remainder", "small_values")
    given.update({name: torch.zeros_like(given[name]).requires_grad_() for name in names})
    given["precision"] = torch.ones(LAYERS, requires_grad=True)
    q = LowRankKroneckerNormal(torch.zeros(LAYERS, LARGE, SMALL), **given)
    prior = dist.Normal(torch.zeros(LAYERS, LARGE, SMALL), 0.5).to_event(2)
    total = q.rsample().sum() + q.log_prob(q.loc + 1).sum() + kl_divergence(q, prior).sum()
    (total + q.effective_dimension().sum() + q.covariance_of(torch.ones(LAYERS, 1, LARGE, SMALL)).sum()).backward()
    assert all(bool(given[name].grad.isfinite().all()) for name in (*names, "precision"))


def test_no_square_matrix_of_the_large_side():
    """Law: half a million inputs cost what half a million numbers cost; with β = ρ it is an elementwise Normal."""
    wide = 500_000
    basis = orthonormal(wide, 2, seed=1)
    small = torch.tensor([1.0, 3.0, 7.0], dtype=torch.float64)
    q = LowRankKroneckerNormal(
        torch.zeros(SMALL, wide, dtype=torch.float64),
        basis,
        values=torch.full((2,), 0.5, dtype=torch.float64),
        remainder=0.5,
        small_basis=torch.eye(SMALL, dtype=torch.float64),
        small_values=small,
        precision=2.0,
        transposed=True,
    )
    expected = dist.Normal(0.0, (2.0 + 0.5 * small).rsqrt().unsqueeze(-1).expand(SMALL, wide)).to_event(2)
    value = q.rsample()
    torch.testing.assert_close(q.log_prob(value), expected.log_prob(value))
    torch.testing.assert_close(q.variance, expected.variance)
    torch.testing.assert_close(value.var(-1), expected.variance[:, 0], rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("loc", (LARGE,), r"loc has shape \(5,\); it needs"),
        ("basis", (LARGE - 1, 2), r"basis has shape \(4, 2\); a 5 × 3 matrix with its large side first needs 5 × k"),
        ("basis", (LARGE, LARGE + 1), r"basis has shape \(5, 6\); .* with k at most 5"),
        ("values", (4,), r"values has shape \(4,\); .* a basis of 2 columns need 2"),
        ("small_basis", (SMALL, 4), r"small_basis has shape \(3, 4\); .* need 3 × 3"),
        ("small_values", (LARGE,), r"small_values has shape \(5,\); .* need 3"),
        ("precision", (LAYERS + 1,), r"batch shapes do not broadcast: .*precision \(3,\).*small_basis \(2,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, shape, message):
    """Law: the error names the argument, its shape and the one that would fit."""
    given = {"loc": array(LAYERS, LARGE, SMALL, seed=7), **parameters(2, 0.7, LAYERS)}
    with pytest.raises(ValueError, match=message):
        LowRankKroneckerNormal(**{**given, name: torch.ones(shape, dtype=torch.float64)})


def test_an_untransposed_matrix_is_not_a_transposed_one():
    """Law: a matrix stored with its large side last needs to be said so; the error says which side was taken."""
    given = parameters(2, 0.7)
    with pytest.raises(ValueError, match="a 3 × 5 matrix with its large side first needs 3 × k"):
        LowRankKroneckerNormal(array(SMALL, LARGE, seed=7), **given)
    with pytest.raises(ValueError, match="a 5 × 3 matrix with its large side last needs 3 × k"):
        LowRankKroneckerNormal(array(LARGE, SMALL, seed=7), **given, transposed=True)


def test_jacobians_that_do_not_fit_are_refused():
    """Law: a Jacobian needs the batch first and the event last, in the event's own orientation."""
    q = example(2, 0.7, True)
    for shape in ((LAYERS, SMALL, LARGE), (LAYERS, 4, LARGE, SMALL), (4, LAYERS, SMALL, LARGE)):
        with pytest.raises(ValueError, match=r"jacobian has shape .*needs batch \(2,\).*event \(3, 5\)"):
            q.covariance_of(torch.ones(shape, dtype=torch.float64))


@pytest.mark.parametrize("name", ["values", "remainder", "small_values", "precision"])
def test_negative_curvature_is_refused(name):
    """Law: β, ρ, σ and λ that make no Normal are refused by name where arguments are validated."""
    given = parameters(2, 0.7)
    with pytest.raises(ValueError, match=f"parameter {name} "):
        LowRankKroneckerNormal(array(LARGE, SMALL, seed=7), **{**given, name: -given[name]}, validate_args=True)


@pytest.mark.parametrize("name", ["basis", "small_basis"])
def test_a_basis_that_is_not_orthonormal_is_refused(name):
    """Law: eigenvectors that carry their eigenvalues are refused: they would be counted twice."""
    given = parameters(2, 0.7, LAYERS)
    with pytest.raises(ValueError, match=f"columns of {name} are not orthonormal"):
        LowRankKroneckerNormal(
            array(LAYERS, LARGE, SMALL, seed=7), **{**given, name: 1.5 * given[name]}, validate_args=True
        )
