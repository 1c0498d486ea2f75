"""An optimiser under a projection: one at a time, of parameters that it has, and as it was afterwards."""

import pytest
import torch
from torch import nn

import forgetcast as fc
from forgetcast.protect.projection import Projection
from forgetcast.protect.restraint import protect
from forgetcast.tuners.base import linear_sites


def test_one_projection_an_optimiser_and_no_closure_for_gradients():
    layer = nn.Linear(6, 3, bias=False)
    projection = Projection(linear_sites("layer", layer), threshold=1.0).after(layer, [torch.randn(2, 6)])
    made = torch.optim.SGD(layer.parameters(), lr=0.1)
    with (
        protect(made, projection),
        pytest.raises(ValueError, match="protected already"),
        protect(made, projection),
    ):
        pass
    layer(torch.randn(2, 6)).sum().backward()
    with protect(made, projection, "gradient"), pytest.raises(ValueError, match="a step with a closure"):
        made.step(lambda: layer(torch.ones(1, 6)).sum())


def test_bad_input_is_refused():
    layer = nn.Linear(6, 3)
    projection = Projection(linear_sites("layer", layer), threshold=1.0)
    foreign = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none of the projected parameters"), protect(foreign, projection):
        pass
    partial = torch.optim.SGD([layer.weight], lr=0.1)
    with pytest.raises(ValueError, match="only a part of"), protect(partial, projection):
        pass
    with pytest.raises(ValueError, match="rows of layer"):
        projection.after(layer, [torch.full((2, 6), torch.nan)])
    with pytest.raises(ValueError, match="no rows were seen at"):
        projection.after(layer, [])
    with pytest.raises(ValueError, match="threshold=0"):
        fc.Projection(projection.sites, threshold=0.0)


def test_hooks_go_when_the_context_ends_also_by_an_error():
    layer = nn.Linear(6, 3, bias=False)
    old = torch.randn(2, 6)
    projection = Projection(linear_sites("layer", layer), threshold=1.0).after(layer, [old])
    made = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="by the user"), protect(made, projection):
        raise RuntimeError("by the user")
    before = layer(old).detach()
    layer(old).square().sum().backward()
    made.step()
    assert float((layer(old) - before).detach().norm()) > 1e-3
