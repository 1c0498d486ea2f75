"""Each feature apart from all others, against its sum written out."""

import math

import pytest
import torch

from forgetcast.protect.instances import instances_apart


@pytest.mark.parametrize("old", [0, 4])
@pytest.mark.parametrize("temperature", [0.8, 3.0])
def test_the_value_is_the_mean_logarithm_of_what_each_has_of_itself(old, temperature):
    draw = torch.Generator().manual_seed(old)
    phi, means = torch.randn(5, 3, generator=draw).double(), torch.randn(old, 3, generator=draw).double()
    rows, total = [*means, *phi], 0.0
    for i, row in enumerate(rows):
        shares = [math.exp(float(row @ other) / temperature) for other in rows]
        total -= math.log(shares[i] / sum(shares))
    found = instances_apart(phi, means, temperature)
    assert found.item() == pytest.approx(total / len(rows))


def test_it_falls_where_a_feature_leaves_an_old_mean_or_another_feature():
    axes = torch.eye(4)
    together, apart = instances_apart(axes[[0, 0]], axes[:0]), instances_apart(axes[[0, 1]], axes[:0])
    assert together.item() == pytest.approx(math.log(2))
    assert apart < together
    assert instances_apart(axes[[1]], axes[[0]]) < instances_apart(axes[[0]], axes[[0]])
