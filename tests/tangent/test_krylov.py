"""Functions of a kernel by Lanczos, and its leading modes, against dense eigen-decompositions of prescribed spectra."""

from math import log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh

from builders import DOUBLE, relative_error
from forgetcast.forecast import filters
from forgetcast.tangent.krylov import krylov_space
from forgetcast.tangent.leading import leading_modes

SPECTRA = {
    "decaying": torch.arange(1, 121, dtype=DOUBLE) ** -1.5,
    "clustered": torch.cat([torch.full((60,), 2.0), torch.full((50,), 0.3), torch.full((10,), 1e-3)]).double(),
    "rank deficient": torch.cat([torch.linspace(1, 0.1, 40), torch.zeros(80)]).double(),
    "condition 1e4": torch.logspace(0, -4, 120, dtype=DOUBLE),
    "condition 1e12": torch.logspace(2, -10, 120, dtype=DOUBLE),
}
FILTERS = {
    "flow": lambda s: filters.gradient_flow(s, 20.0),
    "descent": lambda s: filters.gradient_descent(s, 0.4 / max(float(s.max()), 1), 50),
    "heavy ball": lambda s: filters.momentum_descent(s, 0.4 / max(float(s.max()), 1), 50, 0.7),
    "ridge": lambda s: filters.ridge(s, 0.01),
}


class Kernel:
    """A dense symmetric matrix of prescribed eigenvalues that counts its products."""

    def __init__(self, values, seed=0):
        generator = torch.Generator().manual_seed(seed)
        size = len(values)
        self.values = values
        self.vectors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=DOUBLE)).Q
        self.matrix = (self.vectors * values) @ self.vectors.T
        self.products = 0
        self.r = torch.randn(size, generator=generator, dtype=DOUBLE)

    def __call__(self, u):
        self.products += u.numel() // len(self.values)
        return (u.reshape(-1, len(self.values)).to(self.matrix) @ self.matrix).reshape(u.shape).to(u)

    def function(self, of, r=None):
        r = self.r if r is None else r
        return self.vectors @ (of(self.values) * (self.vectors.T @ r))


@pytest.mark.parametrize("name", sorted(SPECTRA))
@pytest.mark.parametrize("kind", sorted(FILTERS))
def test_filters_are_those_of_the_dense_decomposition(name, kind):
    kernel = Kernel(SPECTRA[name])
    space = krylov_space(kernel, kernel.r, [FILTERS[kind]])
    assert space.status in ("converged", "exact")
    assert space.products == kernel.products
    assert relative_error(space.apply(FILTERS[kind]), kernel.function(FILTERS[kind])) < 2e-5
    sharp = krylov_space(kernel, kernel.r, [FILTERS[kind]], tolerance=1e-13)
    assert relative_error(sharp.apply(FILTERS[kind]), kernel.function(FILTERS[kind])) < 1e-9


@pytest.mark.parametrize("kind", sorted(FILTERS))
def test_defaults_hold_at_condition_1e4(kind):
    """A tolerance that is off by as much as a percent here is what others ship."""
    kernel = Kernel(torch.logspace(0, -4, 400, dtype=DOUBLE))
    of = FILTERS[kind] if kind != "ridge" else lambda s: filters.ridge(s, 1e-4)
    space = krylov_space(kernel, kernel.r, [of])
    assert relative_error(space.apply(of), kernel.function(of)) < 1e-4


@pytest.mark.parametrize(("reach", "most"), [(10, 15), (100, 40), (1000, 120)])
def test_products_grow_as_the_root_of_time_times_curvature(reach, most):
    values = torch.logspace(0, -6, 1000, dtype=DOUBLE)
    r = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)

    def flow(s):
        return filters.gradient_flow(s, reach)

    space = krylov_space(lambda u: values * u, r / r.norm(), [flow])
    assert space.products <= most
    assert space.products <= sqrt(5 * reach / 4 * log(1e7)) + 1
    assert relative_error(space.apply(flow), flow(values) * r / r.norm()) < 1e-6
    if reach <= 100:  # descent of the same reach takes `reach` steps at least
        early = krylov_space(lambda u: values * u, r / r.norm(), [flow], most=max(most // 3, 2))
        assert early.status == "stopped"
        assert early.residual > 1e-6


def test_one_space_serves_every_time_and_filter():
    kernel = Kernel(SPECTRA["condition 1e4"])
    flows = [lambda s, t=t: filters.gradient_flow(s, t) for t in (0.0, 0.1, 3.0, 400.0)]
    together = krylov_space(kernel, kernel.r, [*flows, FILTERS["ridge"]], tolerance=1e-9)
    longest = krylov_space(kernel, kernel.r, [flows[-1], FILTERS["ridge"]], tolerance=1e-9)
    assert together.products == longest.products
    for flow in flows:
        assert relative_error(together.apply(flow), kernel.function(flow)) < 1e-8


def never(u):
    raise AssertionError("a product was asked for")


def test_nothing_to_do_takes_no_product():
    r = torch.ones(4, 3, dtype=DOUBLE)
    zero = krylov_space(never, torch.zeros_like(r), [FILTERS["ridge"]])
    idle = krylov_space(never, r, [])
    for space in (zero, idle):
        assert torch.equal(space.apply(FILTERS["ridge"]), torch.zeros_like(r))
        assert (space.products, space.status, space.residual) == (0, "exact", 0.0)


def test_an_invariant_space_is_found_and_exact():
    kernel = Kernel(SPECTRA["decaying"])
    r = kernel.vectors[:, [0, 3, 10]] @ torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
    space = krylov_space(kernel, r, [FILTERS["ridge"]], tolerance=1e-15)
    assert (space.status, space.products) == ("exact", 3)
    torch.testing.assert_close(space.values, SPECTRA["decaying"][[10, 3, 0]])
    for of in FILTERS.values():
        assert relative_error(space.apply(of), kernel.function(of, r)) < 1e-10


def test_a_kernel_of_zeros_and_of_one_number():
    r = torch.ones(5, dtype=DOUBLE)
    flat = krylov_space(torch.zeros_like, r, [FILTERS["flow"]])
    torch.testing.assert_close(flat.apply(FILTERS["flow"]), 20 * r)
    single = krylov_space(lambda u: 3 * u, r[:1], [FILTERS["ridge"]])
    torch.testing.assert_close(single.apply(FILTERS["ridge"]), r[:1] / 3.01)


def test_the_defect_of_ridge_is_its_residual():
    kernel = Kernel(SPECTRA["condition 1e4"])
    space = krylov_space(kernel, kernel.r, [FILTERS["ridge"]], most=12)
    assert space.status == "stopped"
    z = space.apply(FILTERS["ridge"])
    residual = kernel.r - kernel(z) - 0.01 * z
    assert space.defect(FILTERS["ridge"]) == pytest.approx(float(residual.norm() / kernel.r.norm()), rel=1e-9)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("name", ["condition 1e4", "condition 1e12", "one small"])
def test_converged_ridge_solves_its_equation(name, tolerance):
    """The change between looks alone would stop where one small eigenvalue dominates the solution."""
    small = torch.cat([torch.tensor([1e-3]), torch.linspace(0.5, 1, 119)]).double()
    kernel = Kernel(SPECTRA.get(name, small))
    penalty = 1e-3 * float(kernel.values.max())
    space = krylov_space(kernel, kernel.r, [lambda s: filters.ridge(s, penalty)], tolerance=tolerance)
    z = space.apply(lambda s: filters.ridge(s, penalty))
    assert space.status == "converged"
    assert float((kernel.r - kernel(z) - penalty * z).norm()) <= 1.001 * tolerance * float(kernel.r.norm())


def test_pre_image_form_is_the_kernel_form():
    kernel = Kernel(SPECTRA["condition 1e12"])
    space = krylov_space(kernel, kernel.r, [FILTERS["flow"]], tolerance=1e-12)
    decayed = space.apply(lambda s: -torch.expm1(-20 * s))
    torch.testing.assert_close(kernel(space.apply(FILTERS["flow"])), decayed, rtol=1e-9, atol=1e-9)


def test_descent_is_simulated_descent():
    kernel = Kernel(SPECTRA["decaying"])
    z, ball, pull = (torch.zeros_like(kernel.r) for _ in range(3))
    for _ in range(50):
        z = z + 0.4 * (kernel.r - kernel(z))
        pull = 0.7 * pull + kernel.r - kernel(ball)
        ball = ball + 0.4 * pull
    space = krylov_space(kernel, kernel.r, [FILTERS["descent"], FILTERS["heavy ball"]], tolerance=1e-13)
    assert relative_error(space.apply(FILTERS["descent"]), z) < 1e-11
    assert relative_error(space.apply(FILTERS["heavy ball"]), ball) < 1e-11


def test_long_flow_is_the_ridgeless_solution():
    kernel = Kernel(SPECTRA["rank deficient"])
    r = kernel(kernel.r)  # in the range, where a solution exists
    space = krylov_space(kernel, r, [lambda s: filters.ridge(s, 0.0)], tolerance=1e-12)
    solution = torch.linalg.pinv(kernel.matrix, hermitian=True) @ r
    assert relative_error(space.apply(lambda s: filters.ridge(s, 0.0)), solution) < 1e-9
    assert relative_error(space.apply(lambda s: filters.gradient_flow(s, 1e4)), solution) < 1e-9


def test_the_basis_stays_orthonormal():
    kernel = Kernel(torch.logspace(0, -14, 300, dtype=DOUBLE))
    space = krylov_space(kernel, kernel.r, [lambda s: filters.ridge(s, 1e-12)], tolerance=1e-14, most=200)
    torch.testing.assert_close(space.basis @ space.basis.T, torch.eye(space.products, dtype=DOUBLE))


def test_single_precision_products_do_not_pass_for_eigenvalues():
    kernel = Kernel(SPECTRA["rank deficient"])
    single = kernel.matrix.float()
    space = krylov_space(
        lambda u: (single @ u.float()).double(),
        kernel.r,
        [FILTERS["ridge"]],
        tolerance=1e-5,
        product_type=torch.float32,
    )
    assert space.status == "converged"
    assert bool(((space.values == 0) | (space.values > 1e-7)).all())
    assert relative_error(space.apply(FILTERS["ridge"]), kernel.function(FILTERS["ridge"])) < 1e-4
    narrow = krylov_space(lambda u: single @ u, kernel.r.float(), [FILTERS["ridge"]], tolerance=1e-5)
    assert narrow.apply(FILTERS["ridge"]).dtype == torch.float32
    assert relative_error(narrow.apply(FILTERS["ridge"]), kernel.function(FILTERS["ridge"])) < 1e-4


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, -0.5, 0.2]), torch.tensor([1.0, float("nan"), 0.2])])
def test_what_is_no_kernel_is_refused(wrong):
    with pytest.raises(ValueError, match=r"positive semi-definite|finite"):
        krylov_space(lambda u: wrong.double() * u, torch.ones(3, dtype=DOUBLE), [FILTERS["ridge"]])


@pytest.mark.parametrize(("setting", "match"), [({"tolerance": 0}, "tolerance"), ({"most": 0}, "most")])
def test_meaningless_settings_are_refused(setting, match):
    with pytest.raises(ValueError, match=match):
        krylov_space(never, torch.ones(3, dtype=DOUBLE), [FILTERS["ridge"]], **setting)
    with pytest.raises(ValueError, match=match):
        leading_modes(never, (3,), 1, **setting)


@settings(max_examples=40)
@given(
    st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=12),
    st.integers(0, 1000),
    st.sampled_from(sorted(FILTERS)),
)
def test_any_spectrum(values, seed, kind):
    kernel = Kernel(torch.tensor(values, dtype=DOUBLE), seed)
    space = krylov_space(kernel, kernel.r, [FILTERS[kind]], tolerance=1e-12)
    expected = kernel.function(FILTERS[kind])
    assert float((space.apply(FILTERS[kind]) - expected).norm()) <= 1e-8 * float(expected.norm())


def multiple(count, copies):
    return torch.repeat_interleave(torch.arange(1, count + 1, dtype=DOUBLE) ** -1.0, copies)


@pytest.mark.parametrize(
    ("values", "k", "block"),
    [
        (SPECTRA["decaying"], 10, 1),
        (SPECTRA["decaying"], 10, 4),
        (SPECTRA["decaying"], 120, 3),
        (SPECTRA["clustered"], 5, 2),
        (SPECTRA["condition 1e12"], 6, 1),
        (SPECTRA["rank deficient"], 45, 3),
        (multiple(20, 6), 10, 6),
        (multiple(20, 6), 10, 1),  # copies that a block of one can only find by looking for them
        (torch.zeros(10, dtype=DOUBLE), 3, 2),
    ],
)
def test_leading_modes_are_the_dense_ones(values, k, block):
    kernel = Kernel(values)
    found = leading_modes(kernel, (len(values) // 2, 2), k, block=block)
    assert found.converged
    assert found.products == kernel.products
    exact = values.sort(descending=True).values[:k]
    torch.testing.assert_close(found.values, exact, rtol=1e-7, atol=1e-9 * float(exact[0]) + 1e-15)
    flat = found.vectors.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(k, dtype=DOUBLE))
    apart = (kernel(found.vectors).flatten(1) - found.values[:, None] * flat).norm(dim=1)
    torch.testing.assert_close(apart, found.residuals, rtol=1e-4, atol=1e-10)
    assert float(apart.max()) <= 2e-5 * float(exact[0])


@pytest.mark.parametrize("copies", [1, 5])
def test_leading_modes_take_no_more_products_than_scipy(copies):
    kernel, k = Kernel(multiple(300 // copies, copies)), 10
    found = leading_modes(kernel, (300,), k, block=copies)
    kernel.products = 0
    operator = LinearOperator(
        (300, 300), lambda x: kernel(torch.from_numpy(np.ascontiguousarray(x))).numpy(), dtype=float
    )
    theirs = eigsh(operator, k, v0=kernel.r.numpy())[0][::-1].copy()
    torch.testing.assert_close(found.values, torch.from_numpy(theirs), rtol=1e-7, atol=0)
    assert found.products <= kernel.products


def test_leading_modes_that_are_not_there_yet_say_so():
    kernel = Kernel(SPECTRA["decaying"])
    assert not leading_modes(kernel, (120,), 10, most=14).converged
    with pytest.raises(ValueError, match="at most 120"):
        leading_modes(kernel, (120,), 121)
