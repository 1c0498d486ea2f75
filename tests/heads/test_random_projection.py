"""The random projection: the same from the same seed, saved, and never negative."""

import pytest
import torch

from builders import features
from forgetcast.heads.projection import RandomProjection


def test_it_follows_from_the_seed_alone_and_touches_no_global_state():
    state = torch.get_rng_state()
    one, two, other = (RandomProjection(5, 40, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    phi = features(7, 5)
    assert torch.equal(one(phi), two(phi))
    assert not torch.equal(one(phi), other(phi))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(phi), other(phi))
    assert not list(one.parameters())


def test_it_is_a_relu_of_standard_normal_combinations():
    """E relu(w x)^2 = |x|^2 / 2 for standard normal w: 20,000 draws are within 10 % of it (5 standard deviations)."""
    phi = features(4, 5)
    projected = RandomProjection(5, 20_000, 0)(phi)
    assert (projected >= 0).all()
    assert torch.allclose(projected.square().mean(1), phi.square().sum(1) / 2, rtol=0.1)


@pytest.mark.parametrize(
    ("given", "made"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)],
)
def test_half_precision_is_projected_in_single(given, made):
    assert RandomProjection(5, 8, 0)(features(3, 5, dtype=given)).dtype == made


def test_another_width_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 4\) for a projection of width 5"):
        RandomProjection(5, 8, 0)(features(3, 4))
