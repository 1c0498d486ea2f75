"""Blocks of several sets of samples against dense ones, for modules whose parameters go every way there is."""

import pytest
import torch
from oracles import caught

from builders import relative_error
from forgetcast.tangent.inputs import at
from forgetcast.tangent.jacobian import trainable
from forgetcast.tangent.kernel import joint_kernel

MODULES = [
    "perceptron",
    "tied_linear_layers",
    "one_layer_on_different_lengths",
    "embedding_with_padding",
    "convolutions",
    "prompt_tokens",
    "channel_scales",
    "scalar_parameter",
    "experts_that_see_some_samples",
    "torch_encoder_layer",
]


@pytest.mark.parametrize("name", MODULES)
def test_three_sets(name):
    animal, J = caught(name)
    model = animal.model.double()
    places = [slice(0, 2), slice(2, 3), slice(1, 3)]
    options = {"parameters": trainable(model, animal.parameters), "outputs": animal.outputs}
    for trace in (False, True):
        rows = joint_kernel(model, [at(animal.inputs, part) for part in places], trace=trace, **options)
        assert [len(row) for row in rows] == [3, 2, 1]
        for s, row in enumerate(rows):
            for found, t in zip(row, range(s, 3), strict=True):
                dense = torch.einsum("icp,jdp->icjd", J[places[s]], J[places[t]])
                truth = dense.diagonal(dim1=1, dim2=3).mean(-1) if trace else dense
                assert relative_error(found, truth) <= 1e-10
