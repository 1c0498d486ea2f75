"""Per-sample gradients and Jacobians against a float64 oracle, and that the model is left as it was."""

import pytest
import torch
from oracles import caught, jacobian_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from zoo import ZOO, Animal, Function, adapted, parameter

from builders import relative_error
from forgetcast.modes import evaluating
from forgetcast.tangent.inputs import at, called, sample_count, transformed
from forgetcast.tangent.jacobian import heads_of, jacobian, sample_gradients, trainable
from forgetcast.tangent.passes import prepared

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}


def asked(name: str, kind: torch.dtype):
    animal, truth = caught(name)
    model = animal.model.to(kind)
    inputs = transformed(animal.inputs, lambda x: x.to(kind) if x.is_floating_point() else x)
    return animal, truth, model, inputs, trainable(model, animal.parameters)


def state_of(model: nn.Module):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    flags = [(p.requires_grad, p.grad, p._version) for p in model.parameters()]
    return hooks, flags, [module.training for module in model.modules()]


@pytest.mark.parametrize("kind", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_and_that_the_model_is_left_as_it_was(name, kind):
    animal, truth, model, inputs, parameters = asked(name, kind)
    before = state_of(model)
    J = jacobian(model, inputs, parameters, animal.outputs)
    assert J.dtype == kind
    assert relative_error(J, truth) <= TOLERANCE[kind]
    assert not J.requires_grad
    assert state_of(model) == before


@pytest.mark.parametrize("name", ZOO)
def test_gradients_of_losses_in_chunks(name):
    animal, truth, model, inputs, parameters = asked(name, torch.float64)
    heads, y = heads_of(animal.outputs), torch.tensor([1, 0, 1])

    def losses(outputs, places):
        return -cross_entropy(heads(outputs, places), y[places], reduction="none")

    with torch.no_grad(), evaluating(model):
        logits = heads(called(model, inputs), slice(None))
    cotangents = nn.functional.one_hot(y, truth.shape[1]) - logits.softmax(1)
    rows, values = sample_gradients(model, inputs, parameters, losses, chunk=2)
    assert relative_error(rows, torch.einsum("nc,ncp->np", cotangents, truth)) <= 1e-10
    assert relative_error(values, -cross_entropy(logits, y, reduction="none")) <= 1e-10


@pytest.mark.parametrize("name", ZOO)
def test_rules_are_used_wherever_they_apply(name):
    animal, _, model, inputs, parameters = asked(name, torch.float64)
    with prepared(model, inputs, parameters, heads_of(animal.outputs), None) as work:
        assert {*work.survey.vectorised, *work.survey.looped} == set(animal.general)
        # data decide the way through experts and masks, and recurrent layers have no batching rule
        assert not work.survey.looped or name in ("recurrent", "experts_that_see_some_samples", "bert")


@pytest.mark.parametrize("passes", [1, 2, 4, 5])  # the third tries vmap, whose errors only mean that it is not for it
def test_an_error_inside_a_pass_leaves_nothing_behind(passes):
    left = [passes]

    def forward(self, x):
        left[0] -= 1
        h = self.layer(x)
        if left[0] == 0:
            raise RuntimeError("stop here")
        return self.head(torch.tanh(h * self.scale))

    model = Function(forward, layer=nn.Linear(4, 5), head=nn.Linear(5, 3), scale=parameter(5)).train()
    model.head.bias.requires_grad_(False)
    before, x = state_of(model), torch.randn(4, 4)
    with pytest.raises(RuntimeError, match="stop here"):
        jacobian(model, x, trainable(model, list(dict(model.named_parameters()))), chunk=2)
    assert state_of(model) == before
    left[0] = 0
    model(x).sum().backward()  # autograd goes on as ever
    assert model.head.bias.grad is None
    assert model.scale.grad is not None


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, at the first jvp
def test_fused_attention_is_gone_through():
    """Forward-mode products cannot: that is why nothing here uses them."""
    model = adapted(["q_proj", "v_proj"]).double().eval()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    parameters = trainable(model)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = jacobian(model, {"pixel_values": images}, parameters)
        values = tuple(p.detach() for p in parameters.values())

        def outputs(*given):
            named = dict(zip(parameters, given, strict=True))
            return torch.func.functional_call(model, named, (), {"pixel_values": images}).logits

        with pytest.raises(NotImplementedError):
            torch.func.jvp(outputs, values, values)
    assert relative_error(fused, jacobian_of(Animal(model, {"pixel_values": images}))) <= 1e-10


def test_samples_go_through_the_model_in_chunks_once():
    model, seen = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    jacobian(model, torch.randn(10, 5), trainable(model), chunk=4)
    assert seen == [2, 1, 4, 4, 2]  # the survey's pair, its first sample alone, then every sample once


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_chunks_do_not_matter(chunk):
    model, x = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double(), torch.randn(7, 5).double()
    whole = jacobian(model, x, trainable(model))
    assert relative_error(jacobian(model, x, trainable(model), chunk=chunk), whole) <= 1e-12


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", ["samples_on_the_second_axis", "position_embedding", "convolutions", "bert"])
def test_few_samples(name, n):
    animal, truth, model, inputs, parameters = asked(name, torch.float64)
    assert relative_error(jacobian(model, at(inputs, slice(0, n)), parameters, animal.outputs), truth[:n]) <= 1e-10


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float64])
def test_the_type_of_the_result_is_free(kind):
    _, truth, model, inputs, parameters = asked("one_module_three_times", torch.float64)
    found = jacobian(model, inputs, parameters, lambda y: y[:, 0], dtype=kind)
    assert found.dtype == kind
    assert relative_error(found, truth) <= torch.finfo(kind).eps


def test_lora_starts_with_a_first_factor_that_does_not_matter():
    """Trap 16: exactly zero while the second factor is, and only then."""
    torch.manual_seed(0)
    model = adapted(["q_proj", "v_proj"], init_lora_weights=True)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(value)
    images = torch.randn(3, 3, 8, 8)
    parameters = trainable(model)
    first = torch.cat([torch.full((p.numel(),), "lora_A" in name) for name, p in parameters.items()])
    J = jacobian(model, {"pixel_values": images}, parameters)
    assert not J[..., first].any()
    assert J[..., ~first].any()
    step = torch.optim.SGD(parameters.values(), lr=1.0)
    model(pixel_values=images).logits.square().sum().backward()
    step.step()
    assert jacobian(model, {"pixel_values": images}, parameters)[..., first].any()


def test_parameters_are_chosen_by_name_or_filter_and_tied_ones_come_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    assert list(trainable(model)) == ["0.weight", "1.bias"]
    assert list(trainable(model, ["1.bias", "0.bias"])) == ["0.bias", "1.bias"]
    assert list(trainable(model, ["1.weight"])) == ["1.weight"]
    assert list(trainable(model, lambda name, p: p.ndim == 1)) == ["0.bias", "1.bias"]


def test_frozen_parameters_can_be_asked_for_by_name():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(3, 3).double()
    truth = jacobian(model, x, trainable(model, ["0.weight"]))
    model.requires_grad_(False)
    assert relative_error(jacobian(model, x, trainable(model, ["0.weight"])), truth) <= 1e-12
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_does_not_matter_whether_gradients_are_on(context):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3, 3)
    truth = jacobian(model, x, trainable(model))
    with context():
        assert torch.equal(jacobian(model, x, trainable(model)), truth)


def linear() -> nn.Module:
    return nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("match", "work"),
    [
        ("'wieght'.*nearest are .*weight", lambda: trainable(linear(), ["wieght"])),
        ("leaves none.*at least one", lambda: trainable(linear().requires_grad_(False))),
        ("does not hold.*very model", lambda: jacobian(linear(), torch.ones(2, 3), trainable(linear()))),
        ("shapes .*first axis", lambda: of_linear((torch.ones(2, 3), torch.ones(3, 3)))),
        ("shapes .*at least one", lambda: of_linear(torch.ones(0, 3))),
        ("chunk=0", lambda: of_linear(torch.ones(2, 3), chunk=0)),
        (r"\(2,\) to differentiate.*2 rows", lambda: of_linear(torch.ones(2, 3), outputs=lambda y: y.sum(1))),
        ("nan.*finite numbers", lambda: of_linear(torch.full((2, 3), torch.nan))),
    ],
)
def test_bad_input(match, work):
    with pytest.raises(ValueError, match=match):
        work()


def of_linear(inputs, outputs=None, chunk=None):
    model = linear()
    return jacobian(model, inputs, trainable(model), outputs, chunk=chunk)


def test_one_number_a_sample_is_expected_of_scalars():
    model = linear()
    with pytest.raises(ValueError, match="2 numbers a sample.*Use `jacobian`"):
        sample_gradients(model, torch.ones(2, 3), trainable(model), lambda y, _: y)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (nn.BatchNorm1d(4, track_running_stats=False), "a BatchNorm1d over the batch.*running statistics"),
        (Centred(), "when the sample comes alone.*take statistics over samples out"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_samples_that_depend_on_each_other_are_refused(layer, match, place):
    parts = [nn.Linear(4, 4), nn.Linear(4, 2)]
    parts.insert(place, layer)
    model = nn.Sequential(*parts)
    with pytest.raises(ValueError, match=match):
        jacobian(model, torch.randn(5, 4), trainable(model))


class Rounded(nn.Module):
    """Outputs that add up to what rounding leaves, which hangs on the size of the batch."""

    def __init__(self, wrapped):
        super().__init__()
        self.layer, self.wrapped = nn.Linear(4, 1), wrapped

    def forward(self, x):
        one = self.layer(x)
        both = torch.cat([one, 1e-7 * len(x) - one], 1).double()
        return self.wrapped(both)


@pytest.mark.parametrize(
    "wrapped", [lambda y: y, lambda y: {"logits": y}, lambda y: (y,)], ids=["as is", "named", "one"]
)
def test_outputs_that_cancel_are_no_dependence_between_samples(wrapped):
    model = Rounded(wrapped)

    def total(found):
        while not isinstance(found, torch.Tensor):
            found = found["logits"] if isinstance(found, dict) else found[0]
        return found.sum(1, keepdim=True).float()

    found = jacobian(model, torch.randn(5, 4), trainable(model), total)
    assert float(found.abs().max()) == 0


def test_inputs_that_are_overwritten_after_use_are_refused():
    """Autograd would refuse to train such a model, too."""

    def forward(self, x):
        h = x * 1
        y = self.layer(h)
        h += 1
        return y

    model = Function(forward, layer=nn.Linear(3, 2))
    with pytest.raises((ValueError, RuntimeError), match="overwritten|modified by an inplace operation"):
        jacobian(model, torch.randn(4, 3), trainable(model))


def test_memory_of_what_a_pass_keeps_sets_the_chunk():
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    x = torch.randn(5, 64)
    with prepared(model, x, trainable(model), heads_of(None), None) as work:
        assert 4 * (64 + 64) <= work.survey.sample_bytes <= 4 * (64 + 64 + 2) * 2
        assert work.chunk == sample_count(x)
