"""Blocks of tangent kernels against dense ones, in every form that the planner may choose."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from oracles import caught, jacobian_of
from torch import nn
from zoo import ZOO, Animal, adapted

from builders import relative_error
from forgetcast.tangent.gram import block, collect
from forgetcast.tangent.inputs import at, transformed
from forgetcast.tangent.jacobian import heads_of, jacobian, trainable
from forgetcast.tangent.kernel import kronecker_kernel, tangent_kernel, trace_kernel
from forgetcast.tangent.passes import prepared
from forgetcast.tangent.planner import LayerSize, plan

A, B = slice(0, 2), slice(2, 3)


def dense(left, right):
    return torch.einsum("icp,jdp->icjd", left, right)


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name, kind, tolerance):
    animal, J = caught(name)
    model = animal.model.to(kind)
    inputs = transformed(animal.inputs, lambda x: x.to(kind) if x.is_floating_point() else x)
    a, b = at(inputs, A), at(inputs, B)
    options = {"parameters": trainable(model, animal.parameters), "outputs": animal.outputs}
    full = tangent_kernel(model, a, b, **options)
    for left, right, found in ((A, A, full.aa), (A, B, full.ab), (B, B, full.bb)):
        assert relative_error(found, dense(J[left], J[right])) <= tolerance
    if kind == torch.float64:
        mean = dense(J, J).diagonal(dim1=1, dim2=3).mean(-1)
        trace = trace_kernel(model, a, b, **options)
        for left, right, found in ((A, A, trace.aa), (A, B, trace.ab), (B, B, trace.bb)):
            assert relative_error(found, mean[left, right]) <= tolerance


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("keeps", ["factors", "rows"])
@pytest.mark.parametrize(
    "name", ["tied_linear_layers", "one_layer_on_different_lengths", "embedding_with_padding", "lora", "gpt2"]
)
def test_every_form_gives_the_same(name, keeps, trace, monkeypatch):
    """Trap 2, the numbers: Gram, explicit from kept factors, explicit from kept rows; in one block or in many."""
    animal, _ = caught(name)
    parameters, heads = trainable(animal.model.double(), animal.parameters), heads_of(animal.outputs)
    with prepared(animal.model, animal.inputs, parameters, heads, 2) as work:
        found = []
        sizes = work.survey.sizes
        general = {k: parameters[k].numel() for k in (*work.survey.vectorised, *work.survey.looped)}
        planned = plan(sizes, general, samples=[3], outputs=work.survey.outputs, chunk=2, trace=trace)
        for form in ("gram", "explicit"):
            layers = {
                name: replace(layer, form=form, keeps="factors" if form == "gram" else keeps)
                if name in sizes and sizes[name].inputs is not None
                else layer
                for name, layer in planned.layers.items()
            }
            mine = replace(planned, layers=layers)
            side = collect(work, mine)
            for workspace in (2**26, 64):
                monkeypatch.setattr("forgetcast.tangent.gram.WORKSPACE", workspace)
                found.append(block(side, side, mine, trace=trace, device=torch.device("cpu")))
    for other in found[1:]:
        assert relative_error(other, found[0]) <= 1e-12


def perceptron(*widths: int) -> nn.Sequential:
    layers = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


@settings(max_examples=15)
@given(
    tokens=some.integers(1, 5),
    inputs=some.integers(1, 6),
    outputs=some.integers(1, 6),
    counts=some.tuples(some.integers(1, 5), some.integers(1, 5)),
    seed=some.integers(0, 100),
)
def test_blocks_of_any_shape(tokens, inputs, outputs, counts, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh(), nn.Flatten(), nn.Linear(tokens * outputs, 2)).double()
    a, b = (torch.randn(n, tokens, inputs).double() for n in counts)
    found = tangent_kernel(model, a, b)
    left, right = (jacobian_of(Animal(model, part)) for part in (a, b))
    for mine, truth in ((found.aa, dense(left, left)), (found.ab, dense(left, right)), (found.bb, dense(right, right))):
        assert relative_error(mine, truth) <= 1e-10


def test_symmetric_positive_additive_and_permuted():
    torch.manual_seed(0)
    model, x = perceptron(5, 7, 6, 3).double(), torch.randn(9, 5).double()
    K = tangent_kernel(model, x).aa.flatten(2).flatten(0, 1)
    assert torch.equal(K, K.T)
    assert torch.linalg.eigvalsh(K)[0] >= -1e-12 * K.norm()
    parts = [tangent_kernel(model, x, parameters=trainable(model, [name])).aa for name in trainable(model)]
    assert relative_error(sum(parts).flatten(2).flatten(0, 1), K) <= 1e-12
    order = torch.randperm(9)
    mixed = tangent_kernel(model, x[order]).aa
    assert (
        relative_error(mixed.flatten(2).flatten(0, 1), K.view(9, 3, 9, 3)[order][:, :, order].reshape(27, 27)) <= 1e-12
    )


def test_perceptrons_never_build_a_gradient(monkeypatch):
    """T = 1: the products of inputs and of gradients are all that is kept."""
    model = perceptron(30, 40, 6, 4)
    found = tangent_kernel(model, torch.randn(6, 30))
    assert {layer.form for layer in found.plan.layers.values()} == {"gram"}
    assert {layer.keeps for layer in found.plan.layers.values()} == {"factors"}
    assert found.plan.bytes < 4 * 6 * 4 * 30 * 40
    monkeypatch.setattr("forgetcast.tangent.gram.Side.built", None)
    assert relative_error(tangent_kernel(model, torch.randn(6, 30)).aa.sum(), torch.ones(())) > 0


def test_low_rank_factors_on_tokens_are_explicit():
    """Trap 2: fifty times slower the other way, at 65 tokens."""
    sizes = {
        "lora_A": LayerSize(8 * 192, tokens=65, inputs=192, outputs=8, layer=0),
        "lora_B": LayerSize(8 * 192, tokens=65, inputs=8, outputs=192, layer=1),
        "head": LayerSize(192 * 10, tokens=1, inputs=192, outputs=10, layer=2),
        "embedding": LayerSize(30_000 * 192, tokens=65, inputs=0, outputs=192, layer=3),
    }
    found = plan(sizes, {}, samples=[48], outputs=10, chunk=48)
    forms = {name: (layer.form, layer.keeps) for name, layer in found.layers.items()}
    assert forms["lora_A"] == forms["lora_B"] == ("explicit", "rows")
    assert forms["head"] == forms["embedding"] == ("gram", "factors")


@given(
    tokens=some.integers(2, 300),
    inputs=some.integers(1, 4000),
    outputs=some.integers(1, 4000),
    c=some.integers(1, 100),
    h=some.floats(0, 100),
)
def test_the_inequality(tokens, inputs, outputs, c, h):
    size = LayerSize(inputs * outputs, tokens, inputs, outputs, 0)
    found = plan({"w": size}, {}, samples=[5, 3], outputs=c, chunk=5, token_pair=h)
    ghost = tokens**2 * (outputs + inputs / c**2 + h) < inputs * outputs
    assert (found.layers["w"].form == "gram") == ghost
    assert (found.forwards, found.backwards) == (1, c)


def test_the_plan_tells_passes_and_operations_of_parameters_without_a_rule():
    found = plan({}, {"prompt": 20, "gate": 10}, samples=[4, 2], outputs=3, chunk=4, looped=["gate"])
    assert (found.forwards, found.backwards) == (3, 9)
    for looped in ([], ["prompt", "gate"]):
        other = plan({}, {"prompt": 20, "gate": 10}, samples=[4, 2], outputs=3, chunk=4, looped=looped)
        assert (other.forwards, other.backwards) == (2, 6)
    pairs = 4 * 4 + 4 * 2 + 2 * 2
    assert found.operations == 9 * 30 * pairs
    assert found.bytes == 4 * 3 * 30 * 6 + 8 * 9 * pairs


def test_too_much_memory_is_refused_before_the_work():
    """Trap 4."""
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), torch.randn(10, 5)
    with pytest.raises(ValueError, match=r"10,\) samples with 3 outputs keeps .*memory=.*trace kernel"):
        tangent_kernel(model, x, memory=100)


def test_gradients_that_are_not_finite_are_refused():
    class Root(nn.Module):
        def forward(self, x):
            return x.sqrt()

    model = nn.Sequential(nn.Linear(2, 2, bias=False), Root())
    nn.init.zeros_(model[0].weight)
    for work in (
        lambda: tangent_kernel(model, torch.ones(3, 2)),
        lambda: jacobian(model, torch.ones(3, 2), trainable(model)),
    ):
        with pytest.raises(ValueError, match="the (kernel|Jacobian) of shape .* finite numbers only"):
            work()


def test_the_sum_of_outputs_is_no_stand_in():
    """Trap 1: a head trained by cross-entropy from zero gives the sum of its outputs no gradient."""
    torch.manual_seed(0)
    model, x, y = perceptron(5, 16, 4), torch.randn(40, 5), torch.randint(0, 4, (40,))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    hidden = trainable(model, lambda name, _: name.startswith("0"))
    summed = tangent_kernel(model, x, parameters=hidden, outputs=lambda z: z.sum(1, keepdim=True)).aa
    mean = trace_kernel(model, x, parameters=hidden).aa
    probed = trace_kernel(model, x, parameters=hidden, probes=64).aa
    assert summed.norm() <= 1e-6 * mean.norm()
    assert relative_error(probed, mean) <= 0.2


def test_random_probes_are_unbiased_and_the_same_for_both_sets():
    torch.manual_seed(0)
    model, x = perceptron(5, 8, 6).double(), torch.randn(7, 5).double()
    exact = trace_kernel(model, x).aa
    drawn = torch.stack([trace_kernel(model, x, probes=4, seed=seed).aa for seed in range(30)])
    error = drawn.std(0) / 30**0.5
    assert ((drawn.mean(0) - exact).abs() <= 5 * error).all()
    again = trace_kernel(model, x, x, probes=4, seed=3)
    assert relative_error(again.ab, drawn[3]) <= 1e-12
    assert relative_error(again.bb, drawn[3]) <= 1e-12


def test_many_outputs_are_probed_unless_told_otherwise():
    model, x = nn.Linear(3, 40).double(), torch.randn(4, 3).double()
    assert trace_kernel(model, x).plan.outputs == 16
    assert trace_kernel(nn.Linear(3, 16), torch.randn(4, 3)).plan.outputs == 16
    J = jacobian(model, x, trainable(model))
    # one linear layer: every output has the same kernel, so any probe gives it
    assert relative_error(trace_kernel(model, x).aa, dense(J, J).diagonal(dim1=1, dim2=3).mean(-1)) <= 1e-12


def test_the_kronecker_kernel_is_exact_where_features_share_one_kernel():
    torch.manual_seed(0)
    model, head, x = nn.Linear(5, 8).double(), torch.randn(3, 8).double(), torch.randn(6, 5).double()
    found = kronecker_kernel(model, x, None, head, features=lambda z: z, probes=2)
    J = jacobian(model, x, trainable(model), lambda z: z @ head.T)
    assert relative_error(found.dense(), dense(J, J)) <= 1e-12
    values = torch.randn(6, 3).double()
    assert relative_error(found @ values, torch.einsum("icjd,jd->ic", dense(J, J), values)) <= 1e-12
    with pytest.raises(ValueError, match=r"features \(2, 8\) and a weight \(3, 7\).*one column for each feature"):
        kronecker_kernel(model, x, None, head[:, :7], features=lambda z: z)


def test_lora_reports_the_factor_that_does_not_matter_yet():
    """Trap 16."""
    model = adapted(["q_proj"], init_lora_weights=True)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(value)
    found = tangent_kernel(model, {"pixel_values": torch.randn(3, 3, 8, 8)})
    assert set(found.zero) == {name for name in trainable(model) if "lora_A" in name}


def test_layers_that_do_not_matter_are_left_out():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    model.forward = lambda x: model["used"](x)
    x = torch.randn(4, 3)
    found = tangent_kernel(model, x)
    assert found.zero == ("unused.weight", "unused.bias")
    assert relative_error(found.aa, tangent_kernel(model["used"], x).aa) <= 1e-7
    with pytest.raises(ValueError, match="none of the 1 parameters.*Choose others"):
        tangent_kernel(model, x, parameters=trainable(model, ["unused.weight"]))
