"""Layers split by `peft` at a singular value: what is allowed of a change, against a decomposition of one's own."""

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

import peft
from tuned_models import hidden, inputs, small

from forgetcast.tuners.anatomy import anatomy
from forgetcast.tuners.lora import LoRA
from forgetcast.tuners.split import allowed, join, layers_to_split, require_rank, split, split_layers

SHAPES = [(20, 10), (10, 20), (12, 12)]


def layer(out: int, width: int) -> nn.Sequential:
    torch.manual_seed(out)
    return nn.Sequential(nn.Linear(width, out)).double()


def leading(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As peft finds them, in float32."""
    left, _, right = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    return left[:, :rank].double(), right[:rank].double()


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_allowed_of_a_change_is_orthogonal_to_the_leading_directions(shape):
    model = layer(*shape)
    left, right = leading(model[0].weight, 4)
    split(model, ["0"], 4)
    known = allowed(model)
    assert set(known) == {f"0.osf_svd_params.default.{factor}_low" for factor in "UV"}
    for key, what in known.items():
        change = torch.randn_like(model.get_parameter(key))
        expected = change - left @ (left.T @ change) if "U_low" in key else change - change @ right.T @ right
        torch.testing.assert_close(what.step(change), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(what.step(what.step(change)), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(what.value(what.start + change), what.start + expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hooks", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_projected_by_peft_or_not_at_all(shape, hooks):
    model = layer(*shape)
    left, right = leading(model[0].weight, 4)
    split(model, ["0"], 4, hooks=hooks)
    x = torch.randn(7, shape[1], dtype=torch.float64)
    model(x).square().sum().backward()
    up, down = (model.get_parameter(f"0.osf_svd_params.default.{factor}_low").grad for factor in "UV")
    shares = [float((left.T @ up).norm() / up.norm()), float((down @ right.T).norm() / down.norm())]
    assert max(shares) < 1e-6 if hooks else min(shares) > 1e-2


@pytest.mark.parametrize("kind", ["vit", "bert", "fused"])
def test_split_and_joined_it_computes_what_it_did(kind):
    model, batch = small(kind), inputs(kind, 3)
    before, weights = hidden(model, batch).detach(), {k: v.clone() for k, v in model.state_dict().items()}
    names = layers_to_split(model)
    split(model, names, 0.5)
    torch.testing.assert_close(hidden(model, batch), before, atol=1e-6, rtol=1e-6)
    training = {name for name, value in model.named_parameters() if value.requires_grad}
    assert training == {f"{name}.osf_svd_params.default.{factor}_low" for name in names for factor in "USV"}
    with torch.no_grad():
        for _, part in split_layers(model):
            part.osf_svd_params.default.S_low.mul_(0.5)
    changed = hidden(model, batch).detach()
    assert (changed - before).abs().max() > 1e-3
    join(model)
    torch.testing.assert_close(hidden(model, batch), changed, atol=1e-6, rtol=1e-6)
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert {name for name in after if not torch.equal(after[name], weights[name])} == {f"{n}.weight" for n in names}
    assert not hasattr(model, "peft_config")


def test_joined_without_merging_the_weights_are_as_they_were():
    model = layer(20, 10)
    before = model[0].weight.detach().clone()
    split(model, ["0"], 0.5)
    with torch.no_grad():
        model[0].osf_svd_params.default.S_low.mul_(0.5)
    join(model, merge=False)
    assert torch.equal(model[0].weight, before)


def test_unload_of_peft_forgets_what_was_learnt():
    """Why layers are joined by merging, unlike the continual example of `peft`: should this fail, it has changed."""
    model = layer(20, 10)
    before = model[0].weight.detach().clone()
    wrapped = peft.get_peft_model(model, peft.OSFConfig(effective_rank=4, target_modules=["0"]))
    with torch.no_grad():
        wrapped.base_model.model[0].osf_svd_params.default.S_low.mul_(0.5)
    assert torch.equal(wrapped.unload()[0].weight, before)


def test_frozen_factors_are_in_the_state():
    """A state that is loaded where another weight was split is that of the first."""
    one, other = layer(20, 10), layer(10, 20)
    other[0] = nn.Linear(10, 20).double()
    x = torch.randn(5, 10, dtype=torch.float64)
    for model in (one, other):
        split(model, ["0"], 4)
    other.load_state_dict(one.state_dict())
    for factor in ("U", "V"):
        key = f"0.osf_svd_params.default.{factor}_low"
        change = torch.randn_like(one.get_parameter(key))
        assert torch.equal(allowed(one)[key].step(change), allowed(other)[key].step(change))
    assert torch.equal(one(x), other(x))


def test_targets_and_layers():
    model = small("vit")
    first, second = anatomy(model).blocks[:2]
    assert layers_to_split(model, ("query", "leave"), [1]) == (second.query, second.leave)
    every = layers_to_split(model, layers=[0])
    assert {first.query, first.key, first.value, first.enter, first.leave} < set(every)
    assert all(name.startswith(f"{first.name}.") for name in every)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: layers_to_split(small("vit"), ("keys",)), "Did you mean 'key'"),
        (lambda: layers_to_split(small("vit"), ("fused",)), r"\['None'\] in the block.*layers of nn.Linear"),
        (lambda: layers_to_split(small("gpt2")), "nothing in the block.*layers of nn.Linear"),
        (lambda: layers_to_split(LoRA().attach(small("vit")).model), "a model with a tuner in place"),
        (lambda: require_rank(layer(20, 10), ["0"], 10), "rank=10, which keeps 10 of the 10 directions of 0"),
        (lambda: require_rank(layer(20, 10), ["0"], 1.0), "rank=1.0, which keeps 10 of the 10"),
        (lambda: require_rank(layer(20, 10), ["0"], 0.05), "rank=0.05, which keeps 0 of the 10"),
        (lambda: require_rank(layer(20, 10), ["0"], 0), "rank=0"),
        (lambda: require_rank(layer(20, 10), ["0"], -0.5), "rank=-0.5"),
    ],
)
def test_what_cannot_be_split(use, message):
    with pytest.raises(ValueError, match=message):
        use()
