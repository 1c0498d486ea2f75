"""Which form a static forecast takes, and how many products it expects."""

import pytest
import torch
from static_networks import network

import forgetcast as fc
from builders import dense_jacobian
from forgetcast.forecast.static import static_drift
from forgetcast.forecast.static_plan import expected_products, static_plan
from forgetcast.tangent.jacobian import trainable


def test_the_plan_takes_the_cheaper_form_that_fits():
    sizes = {"element_bytes": 4, "graph_bytes": 10**6, "memory": 1e9}
    ridge = fc.Ridge(0.1)
    few = static_plan(ridge, 100, 10, 1000, **sizes)
    assert few.form == "explicit"
    assert few.explicit_passes < few.free_passes
    many = static_plan(ridge, 100, 1000, 2000, **sizes)
    assert many.form == "matrix-free"
    assert many.explicit_passes > many.free_passes
    wide = static_plan(ridge, 100, 10, 10**7, **sizes)
    assert wide.form == "matrix-free"
    assert "memory" in wide.reason
    tight = static_plan(ridge, 100, 400, 1000, **(sizes | {"graph_bytes": 10**10}))
    assert tight.free_passes > static_plan(ridge, 100, 400, 1000, **sizes).free_passes
    assert static_plan(fc.SGD(0.1, 5), 100, 1000, 2000, **sizes).form == "explicit"


@pytest.mark.parametrize("steps", [3, 30, 300])
def test_expected_products_are_an_upper_bound_for_stable_descent(steps):
    model, old, new, y = network("convolution")
    J = dense_jacobian(model, new, trainable(model))[0].flatten(0, 1)
    limit = 2 / (2 / 36 * float(torch.linalg.eigvalsh(J @ J.T)[-1]))
    training = fc.GradientDescent(0.9 * limit, steps)
    found = static_drift(model, old, new, y, training)
    assert found.products <= expected_products(training, 36) + 1
