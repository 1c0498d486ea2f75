"""The learning curve against kernel ridge regressions really done, against exact results, and against itself."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from sklearn.datasets import load_digits

from builders import DOUBLE
from forgetcast.forecast.learning_curve import TargetSpectrum, learning_curve, resolution, target_spectrum

WIDTH, OUTPUTS = 120, 20


def spectrum_of(decay: float, seed: int = 0) -> TargetSpectrum:
    values = torch.arange(1, WIDTH + 1, dtype=DOUBLE) ** -decay
    draw = torch.Generator().manual_seed(seed)
    return TargetSpectrum(values, torch.randn(WIDTH, OUTPUTS, generator=draw, dtype=DOUBLE) * values.sqrt()[:, None])


class Simulation:
    """Regressions on drawn Gaussian features, whose kernel has just these eigenvalues, many at once."""

    def __init__(self, spectrum: TargetSpectrum, n: int, draws: int, seed: int):
        draw = torch.Generator().manual_seed(seed)
        self.values = spectrum.eigenvalues
        self.theta = spectrum.weights / self.values.sqrt()[:, None]
        self.phi = torch.randn(draws, n, WIDTH, generator=draw, dtype=DOUBLE) * self.values.sqrt()
        self.noise = torch.randn(draws, n, OUTPUTS, generator=draw, dtype=DOUBLE)
        self.square = self.phi.mT @ self.phi

    def errors(self, penalty: float, noise: float) -> tuple[float, float]:
        """On new samples, exactly, and on the training samples."""
        y = self.phi @ self.theta + noise * self.noise
        held = self.square + penalty * torch.eye(WIDTH, dtype=DOUBLE)
        theta = torch.cholesky_solve(self.phi.mT @ y, torch.linalg.cholesky(held))
        new = (self.values[:, None] * (theta - self.theta).square()).sum((1, 2))
        return float(new.mean()), float((self.phi @ theta - y).square().sum(2).mean())


@pytest.mark.parametrize("n", [30, 75, 400])
@pytest.mark.parametrize("decay", [0.3, 1.0, 1.5])
def test_within_five_per_cent_of_simulation(decay, n):
    """F18, and the noise that its well-known form adds: two draws of all, two penalties, with noise and without."""
    for seed in range(2):
        spectrum = spectrum_of(decay, seed)
        simulation = Simulation(spectrum, n, 50, seed)
        for penalty, noise in product((0.05, 1.0), (0.0, 0.3)):
            curve = learning_curve(spectrum, n, penalty, noise=noise)
            error, training = simulation.errors(penalty, noise)
            assert float(curve.errors) == pytest.approx(error, rel=0.05)
            assert float(curve.training) == pytest.approx(training, rel=0.05)


@pytest.mark.parametrize("penalty", [0.0, 1e-2, 1.0])
def test_draws_from_a_pool_within_five_per_cent_of_simulation(penalty):
    """Without replacement, tested on the others; most of the pool drawn as well as little of it."""
    pool, draws = 150, 60
    draw = torch.Generator().manual_seed(1)
    phi = torch.randn(pool, 2 * pool, generator=draw, dtype=DOUBLE) * torch.arange(1, 2 * pool + 1) ** -0.5
    y = phi @ torch.randn(2 * pool, OUTPUTS, generator=draw, dtype=DOUBLE)
    y = y + 0.5 * torch.randn(pool, OUTPUTS, generator=draw, dtype=DOUBLE)
    kernel = phi @ phi.T
    numbers = [25, 75, 120]
    curve = learning_curve(target_spectrum(kernel, y), numbers, penalty)
    for n, error, training in zip(numbers, curve.errors, curve.training, strict=True):
        order = torch.rand(draws, pool, generator=draw).argsort(1)
        drawn, rest = order[:, :n], order[:, n:]
        gram = kernel[drawn[:, :, None], drawn[:, None]] + penalty * torch.eye(n, dtype=DOUBLE)
        a = torch.linalg.solve(gram, y[drawn])
        new = (kernel[rest[:, :, None], drawn[:, None]] @ a - y[rest]).square().sum(2).mean()
        assert float(error) == pytest.approx(float(new), rel=0.05)
        assert float(training) == pytest.approx(float((penalty * a).square().sum(2).mean()), rel=0.05, abs=1e-20)


def test_real_images_and_a_kernel_that_is_not_linear():
    """Digits, squared exponential kernel, one-hot labels: the spectrum estimated, the regressions really done."""
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.as_tensor(pixels)[:1000] / 16, torch.nn.functional.one_hot(torch.as_tensor(digits)[:1000]).double()
    kernel = torch.exp(-torch.cdist(x, x).square() / 8)
    spectrum = target_spectrum(kernel, y)
    draw = torch.Generator().manual_seed(0)
    for n in (50, 200, 500):
        curve = learning_curve(spectrum, n, 3.0)
        errors, own = [], []
        for _ in range(8):
            order = torch.randperm(1000, generator=draw)
            drawn, rest = order[:n], order[n:]
            a = torch.linalg.solve(kernel[drawn][:, drawn] + 3.0 * torch.eye(n).double(), y[drawn])
            errors.append((kernel[rest][:, drawn] @ a - y[rest]).square().sum(1).mean())
            own.append((3.0 * a).square().sum(1).mean())
        assert float(curve.errors) == pytest.approx(float(torch.stack(errors).mean()), rel=0.05)
        assert float(curve.training) == pytest.approx(float(torch.stack(own).mean()), rel=0.05)


@settings(max_examples=60)
@given(
    values=some.lists(some.floats(1e-6, 1e3), min_size=1, max_size=30),
    n=some.integers(1, 60),
    penalty=some.one_of(some.just(0.0), some.floats(1e-6, 1e3)),
    share=some.one_of(some.none(), some.integers(1, 50)),
)
def test_the_fixed_point(values, n, penalty, share):
    l = torch.tensor(values, dtype=DOUBLE)  # noqa: E741
    pool = None if share is None else max(n, len(values)) + share
    seen = resolution(l, n, penalty, pool)
    if penalty == 0 and n >= len(values):
        assert seen.kappa == 0
        return
    resolved = float((n * l / (seen.kappa + n * l)).sum())
    held = penalty * (1 - (0 if pool is None else resolved / pool))
    assert seen.kappa * (1 - resolved / n) == pytest.approx(held, rel=1e-6, abs=1e-9 * seen.kappa)
    assert resolved < n * (1 + 1e-9)
    assert seen.inflation >= 1 - 1e-9
    scaled = resolution(10 * l, n, 10 * penalty, pool)
    assert scaled.kappa == pytest.approx(10 * seen.kappa, rel=1e-9)
    assert scaled.inflation == pytest.approx(seen.inflation, rel=1e-6)


def test_a_pool_without_end_is_a_distribution():
    spectrum = spectrum_of(1.0)
    pooled = TargetSpectrum(spectrum.eigenvalues, spectrum.weights, 10**9)
    for penalty in (0.0, 0.1):
        ours, theirs = (learning_curve(s, [10, 50, 200], penalty) for s in (pooled, spectrum))
        assert ours.errors.tolist() == pytest.approx(theirs.errors.tolist(), rel=1e-6, abs=1e-12)


def test_limits():
    spectrum = spectrum_of(1.0)
    power = float(spectrum.weights.square().sum())
    assert float(learning_curve(spectrum, 10, 1e9).errors) == pytest.approx(power, rel=1e-6)
    falling = learning_curve(spectrum, [1, 3, 10, 30, 100, 1000, 100_000], 0.1).errors
    assert (falling.diff() < 0).all()
    assert float(falling[-1]) < 1e-6 * power
    flat = TargetSpectrum(torch.ones(20, dtype=DOUBLE), torch.zeros(20, dtype=DOUBLE))
    # least squares with n > p + 1: noise p / (n - p - 1), which is p / (n - p) up to 1/n
    assert float(learning_curve(flat, 400, 0.0, noise=0.5).errors) == pytest.approx(0.25 * 20 / 379, rel=0.01)
    # fewer samples than eigenvalues: the nearest interpolation misses 1 - n / p of the target
    whole = TargetSpectrum(torch.ones(200, dtype=DOUBLE), torch.ones(200, dtype=DOUBLE))
    assert float(learning_curve(whole, 50, 0.0).errors) == pytest.approx(200 * (1 - 50 / 200), rel=1e-9)


def test_the_peak_of_double_descent_and_what_no_kernel_learns():
    noisy = learning_curve(spectrum_of(0.5), [WIDTH - 1, WIDTH], 0.0, noise=0.1)
    assert noisy.errors[1] == float("inf")
    assert noisy.training[1] == 0
    assert float(learning_curve(spectrum_of(0.5), WIDTH, 0.0).errors) == 0.0
    blind = TargetSpectrum(torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 2.0]).double())
    assert float(learning_curve(blind, 5, 0.0).errors) == pytest.approx(4.0 / (1 - 1 / 5))
    assert float(learning_curve(blind, 1000, 0.0).training) == pytest.approx(4.0 * (1 - 1 / 1000))


def test_table_and_one_number():
    spectrum = spectrum_of(1.0)
    table = learning_curve(spectrum, [10, 20], 0.1).table
    assert list(table.index) == [10, 20]
    assert (table["gap"] == table["error"] - table["training"]).all()
    assert float(learning_curve(spectrum, 20, 0.1).errors) == table["error"][20]
    single = TargetSpectrum(spectrum.eigenvalues, spectrum.weights[:, 0])
    rest = TargetSpectrum(spectrum.eigenvalues, spectrum.weights[:, 1:])
    parts = [float(learning_curve(s, 20, 0.1, noise=0.2).errors) for s in (single, rest)]
    assert sum(parts) == pytest.approx(float(learning_curve(spectrum, 20, 0.1, noise=0.2).errors))


def test_bad_input():
    ones = torch.ones(3, dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"eigenvalues \(3,\) and weights \(2,\)"):
        TargetSpectrum(ones, ones[:2])
    with pytest.raises(ValueError, match="expected none below 0 and one above"):
        TargetSpectrum(-ones, ones)
    with pytest.raises(ValueError, match="expected none below 0 and one above"):
        TargetSpectrum(0 * ones, ones)
    with pytest.raises(ValueError, match="no eigenvalues"):
        TargetSpectrum(ones[:0], ones[:0])
    with pytest.raises(ValueError, match="weights .* holds nan"):
        TargetSpectrum(ones, ones * float("nan"))
    with pytest.raises(ValueError, match="got pool=2; expected an integer of at least 3"):
        TargetSpectrum(ones, ones, 2)
    spectrum = TargetSpectrum(ones, ones, 5)
    for samples, message in (
        (0, "samples=0"),
        ([], "no number of samples"),
        ([3, -1], "samples=-1"),
        (5, "a pool of 5"),
    ):
        with pytest.raises(ValueError, match=message):
            learning_curve(spectrum, samples, 1.0)
    with pytest.raises(ValueError, match="penalty=-1.0"):
        learning_curve(spectrum, 3, -1.0)
    with pytest.raises(ValueError, match="noise=0.1 beside a pool"):
        learning_curve(spectrum, 3, 1.0, noise=0.1)
    kernel = torch.eye(4, dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"targets \(3,\) for a kernel \(4, 4\)"):
        target_spectrum(kernel, ones)
    with pytest.raises(ValueError, match="transposes of each other"):
        target_spectrum(kernel + torch.ones(4, 4).double().triu(1), torch.ones(4))


def test_bad_input_as_a_user_has_it(unchecked_types):
    with pytest.raises(ValueError, match="samples=2.5"):
        learning_curve(spectrum_of(1.0), 2.5, 1.0)
