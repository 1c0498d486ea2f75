"""Second moments and spectra against the dense matrices that they stand for."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

import forgetcast as fc
from builders import features, labels
from forgetcast.tangent.linear_head import with_bias
from forgetcast.tangent.moments import bordered_gram, gram, streamed_gram
from forgetcast.tangent.spectrum import overlap, spectrum_of, spectrum_of_gram, spectrum_of_rows


def close(value, truth, tolerance=1e-12):
    torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance * float(truth.abs().max()) + 1e-300)


def spectrum(phi):
    return spectrum_of_gram(phi.T @ phi, torch.float64)


@pytest.mark.parametrize("width", [1, 5, 127, 128, 203])
def test_gram_by_panels_is_the_whole_product(width):
    phi = features(40, width)
    close(gram(phi), phi.T @ phi)
    extended = with_bias(phi, width + 1)
    close(bordered_gram(phi), extended.T @ extended)
    close(streamed_gram(fc.Features(phi, block_rows=7), width + 1), extended.T @ extended)


@pytest.mark.parametrize("block_rows", [7, 8192])
def test_moments_are_those_of_the_extended_features(block_rows):
    phi, y = features(50, 6), labels(50, 0, 4)
    moments = fc.Moments.of(fc.Features(phi, y, block_rows), outputs=4)
    extended, targets = with_bias(phi, 7), torch.nn.functional.one_hot(y, 4).double()
    close(moments.gram, extended.T @ extended)
    close(moments.cross, extended.T @ targets)
    assert (moments.target_square, moments.rows) == (50.0, 50)


def test_moments_of_shards_add():
    phi, y = features(50, 6), features(50, 3, seed=4)
    whole = fc.Moments.of(fc.Features(phi, y), 3)
    total = fc.Moments.of(fc.Features(phi[:20], y[:20]), 3) + fc.Moments.of(fc.Features(phi[20:], y[20:]), 3)
    close(total.gram, whole.gram)
    close(total.cross, whole.cross)
    assert total.target_square == pytest.approx(whole.target_square)
    assert total.rows == 50


@pytest.mark.parametrize(("rows", "width", "rank"), [(9, 30, 9), (30, 30, 30), (12, 20, 4)])
def test_primal_equals_dual(rows, width, rank):
    phi = features(rows, rank, decay=0.5) @ torch.linalg.qr(features(width, rank, seed=2)).Q.T
    primal, dual = spectrum(phi), spectrum_of_rows(phi)
    assert primal.rank == dual.rank == rank
    close(primal.values[:rank], dual.values[:rank], 1e-11)
    kernel = torch.linalg.eigvalsh(phi @ phi.T).flip(0)
    close(dual.values[:rank], kernel[:rank], 1e-11)
    ours, other = (s.vectors[:, :rank] @ s.vectors[:, :rank].T for s in (primal, dual))
    close(ours, other, 1e-9)
    close(dual.vectors.T @ dual.vectors, torch.eye(dual.vectors.shape[1]).double(), 1e-11)


@pytest.mark.parametrize(("size", "rank"), [(3, 2), (30, 1)])
def test_the_factorisation_rounds_by_the_size_of_the_matrix(size, rank):
    values = torch.zeros(size, dtype=torch.float64)
    values[:2] = torch.tensor([1.0, 10 * torch.finfo(torch.float64).eps])
    assert spectrum_of_gram(torch.diag(values), torch.float64).rank == rank
    single = spectrum_of_gram(torch.diag(values), torch.float32)
    assert single.floor == torch.finfo(torch.float32).eps  # the products' own rounding is the larger


def test_the_smaller_form_is_taken():
    assert not spectrum_of(fc.Features(features(5, 9)), 10).complete
    assert spectrum_of(fc.Features(features(15, 9)), 10).complete


def test_the_tangent_kernel_holds_every_eigenvalue_once_an_output():
    phi, outputs = features(8, 5), 3
    kernel = torch.kron(torch.eye(outputs).double(), phi @ phi.T)
    copies = spectrum_of_rows(phi.T.contiguous().T).values[:5].repeat_interleave(outputs)
    close(torch.linalg.eigvalsh(kernel).flip(0)[: 5 * outputs], copies, 1e-11)


def test_effective_rank_of_prescribed_eigenvalues():
    def effective(values):
        return spectrum_of_gram(torch.diag(torch.tensor(values).double()), torch.float64).effective_rank

    assert effective([2.0, 2.0, 2.0, 0.0]) == pytest.approx(3)
    assert effective([3.0, 1.0]) == pytest.approx(16 / 10)
    assert effective([0.0, 0.0]) == 0


def test_cosines_are_those_of_the_principal_angles():
    old, new = features(40, 12, seed=1)[:5], features(40, 12, seed=2)[:4]
    found = overlap(spectrum(old), spectrum(new))
    truth = np.sort(np.cos(subspace_angles(old.T.numpy(), new.T.numpy())))[::-1]
    np.testing.assert_allclose(found.cosines.numpy(), truth, atol=1e-12)
    assert found.mean_square == pytest.approx((truth**2).sum() / 4)


def test_energy_weighted_overlap_is_that_of_the_dense_kernels():
    old, new = features(20, 6, seed=1), features(15, 6, seed=2)
    norms = [float((a @ b.T).norm()) for a, b in ((old, new), (old, old), (new, new))]
    found = overlap(spectrum(old), spectrum(new)).energy_weighted
    assert found == pytest.approx(norms[0] ** 2 / norms[1] / norms[2], rel=1e-10)


def test_a_space_overlaps_itself_wholly():
    own = spectrum(features(20, 6))
    found = overlap(own, own)
    close(found.cosines, torch.ones(6).double())
    assert found.mean_square == pytest.approx(1)
    assert found.energy_weighted == pytest.approx(1)


def test_orthogonal_feature_spaces_forget_nothing():
    old, new = torch.zeros(30, 8).double(), torch.zeros(25, 8).double()
    old[:, :4], new[:, 4:] = features(30, 4), features(25, 4, seed=3)
    head = fc.LinearHead.zeros(8, 3, bias=False, dtype=torch.float64)
    for loss in ("squared", "cross_entropy"):
        training = fc.GradientDescent(learning_rate=0.1, steps=50, loss=loss)
        forecast = fc.forecast_linear(fc.Features(old), fc.Features(new, labels(25, 0, 3)), head, training)
        assert float(forecast.change.norm()) > 0
        assert float(forecast.drift.abs().max()) <= 1e-15
        assert forecast.overlap().mean_square <= 1e-25
        assert forecast.overlap().energy_weighted <= 1e-25
