"""Small models and tasks whose every number can be computed densely."""

import torch
from torch import nn

from forgetcast.heads.linear import Linear
from forgetcast.methods.base import Batch, Model, TaskData


def small_model(seed=0, inputs=4, outputs=3, hidden=5):
    """A tanh layer (none if `hidden` is 0) and a linear head with random weights, in float64."""
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh()) if hidden else nn.Identity()
    head = Linear(hidden or inputs, outputs)
    nn.init.normal_(head.weight)
    nn.init.normal_(head.bias)
    return Model(backbone, head).double()


def small_task(seed=0, n=12, inputs=4, classes=(0, 1, 2), seen=None, index=0, batch=5):
    """Random inputs and labels of `classes`, read in batches that do not divide n."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=generator, dtype=torch.float64)
    y = torch.tensor(classes)[torch.randint(len(classes), (n,), generator=generator)]
    rows = torch.arange(n)
    whole = Batch(x, y, rows)
    task = TaskData(index, classes, seen or classes, lambda: (Batch(x[r], y[r], r) for r in rows.split(batch)))
    return whole, task


def moved(model, seed=9):
    """Every parameter displaced at random; returns the displacements by name."""
    generator = torch.Generator().manual_seed(seed)
    steps = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += steps[name]
    return steps


def jacobian(model, x):
    """(n, C, P) of the logits, parameters flattened in order."""
    names, values = zip(*[(n, p.detach()) for n, p in model.named_parameters()], strict=True)

    def logits(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    parts = torch.autograd.functional.jacobian(logits, values)
    return torch.cat([part.flatten(2) for part in parts], 2)


def assert_plain(state):
    """Nested dicts with string keys, of tensors and plain JSON values."""
    if isinstance(state, dict):
        assert all(isinstance(key, str) for key in state)
        for value in state.values():
            assert_plain(value)
    elif isinstance(state, list):
        assert all(isinstance(value, int | float | str | bool) for value in state)
    else:
        assert isinstance(state, torch.Tensor | int | float | str | bool) or state is None
