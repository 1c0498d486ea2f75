"""The slow and obvious Jacobian, in float64, that fast ones are held against."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from zoo import ZOO, Animal

from forgetcast.tangent.inputs import arguments, at, called, sample_count
from forgetcast.tangent.jacobian import heads_of, trainable


@cache
def caught(name: str) -> tuple[Animal, Tensor]:
    """An animal of the zoo and its Jacobian; tests may change the type of the model."""
    torch.manual_seed(0)
    animal = ZOO[name]()
    return animal, jacobian_of(animal)


def jacobian_of(animal: Animal) -> Tensor:
    """J (n, c, p): every sample alone, every output alone."""
    model = animal.model.double()
    modes = [module.training for module in model.modules()]
    model.eval()
    parameters, heads = trainable(model, animal.parameters), heads_of(animal.outputs)
    one = by_torch_func if animal.functional else by_autograd
    rows = [
        one(model, at(animal.inputs, slice(i, i + 1)), parameters, heads) for i in range(sample_count(animal.inputs))
    ]
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return torch.stack(rows).detach()


def by_torch_func(model: nn.Module, sample, parameters, heads) -> Tensor:
    def outputs(values):
        return heads(functional_call(model, values, *arguments(sample)), slice(0, 1))[0]

    values, pull = vjp(outputs, {name: parameter.detach() for name, parameter in parameters.items()})
    basis = torch.eye(len(values), dtype=values.dtype)
    return torch.stack([torch.cat([part.flatten() for part in pull(row)[0].values()]) for row in basis])


def by_autograd(model: nn.Module, sample, parameters, heads) -> Tensor:
    def row(c: int) -> Tensor:
        value = heads(called(model, sample), slice(0, 1))[0, c]
        found = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
        return torch.cat([part.flatten() for part in found])

    return torch.stack([row(c) for c in range(heads(called(model, sample), slice(0, 1)).shape[1])])
