"""Placed rows minimise the cross-entropy of their own classes, and nothing else moves."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from forgetcast.forecast.network.placed import place_rows
from forgetcast.heads.cosine import Cosine
from forgetcast.heads.linear import Linear

X, Y = load_digits(return_X_y=True)
PHI, LABELS = torch.from_numpy((X / 16).astype(np.float32)), torch.from_numpy(Y.astype(np.int64))
NEW = (LABELS >= 4) & (LABELS < 8)


def filled(kind) -> torch.nn.Module:
    head = kind(64, 10)
    with torch.no_grad():
        for parameter in (getattr(head, name) for name in head.by_output):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) + 1)
    return head


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_only_the_new_rows_move_and_they_classify(kind):
    head = filled(kind)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    place_rows(head, PHI[NEW], LABELS[NEW], [7, 4, 5, 6])
    for name, value in head.state_dict().items():
        if name in head.by_output:
            kept = [0, 1, 2, 3, 8, 9]
            assert torch.equal(value[kept], before[name][kept])
            assert not torch.equal(value[4:8], before[name][4:8])
        else:
            assert torch.equal(value, before[name])
    assert (head(PHI[NEW])[:, 4:8].argmax(1) + 4 == LABELS[NEW]).double().mean() > 0.97
    assert all(parameter.requires_grad and parameter.grad is None for parameter in head.parameters())


def test_it_is_logistic_regression():
    head, ridge = Linear(64, 10, bias=False), 0.05
    place_rows(head, PHI[NEW], LABELS[NEW], [4, 5, 6, 7], iterations=2000, ridge=ridge)
    strength = ridge * float(PHI[NEW].square().mean()) * int(NEW.sum())
    model = LogisticRegression(C=1 / strength, fit_intercept=False, tol=1e-10, max_iter=5000)
    model.fit(PHI[NEW].double().numpy(), LABELS[NEW].numpy())
    expected = torch.from_numpy(model.coef_)
    assert float((head.weight[4:8].detach().double() - expected).norm() / expected.norm()) < 1e-3


def test_what_cannot_be_placed():
    with pytest.raises(ValueError, match="labels outside"):
        place_rows(Linear(64, 10), PHI, LABELS, [4, 5])
    with pytest.raises(ValueError, match="without rows that train"):
        place_rows(torch.nn.Identity(), PHI[NEW], LABELS[NEW], [4, 5, 6, 7])
