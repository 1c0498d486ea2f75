"""What was forecast beside what was measured, and where in the model it comes from."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from real_run import measured_drift, really_trained
from small_networks import NEW, network_and_task
from torch import nn
from torch.nn.functional import cross_entropy

import forgetcast as fc
from builders import DOUBLE, dense_jacobian
from forgetcast.forecast.network.layers import block_of
from forgetcast.forecast.network_modes import network_modes
from forgetcast.tangent.jacobian import trainable
from forgetcast.tangent.operator import TangentOperator

TRAINING = fc.AdamW(5e-3, 20, batch_size=8, classes=NEW)


@pytest.fixture(scope="module")
def case():
    """A perceptron, its tasks, a forecast at half the cost and the run itself."""
    model, old, new = network_and_task("perceptron", old=40, new=60)
    with torch.no_grad():
        model[4].bias[:2] += 0.5
        old = old[0], model(old[0])[:, :2].argmax(1)  # so that it answers most rightly
    forecast = fc.forecast(model, old, new, TRAINING, budget=0.6)
    return (
        model,
        old,
        new,
        forecast,
        forecast.logits_before + measured_drift(model, really_trained(model, new, TRAINING), old),
    )


def test_by_sample(case):
    *_, forecast, measured = case
    found = fc.compare_drift(forecast, measured)
    table, labels = found.per_sample, forecast.labels.tolist()
    assert len(table) == 40
    for i, row in table.iterrows():
        predicted, actual = forecast.drift[i], measured[i] - forecast.logits_before[i]
        assert row["predicted"] == pytest.approx(predicted.norm().item())
        assert row["measured"] == pytest.approx(actual.norm().item())
        assert row["cosine"] == pytest.approx(torch.cosine_similarity(predicted, actual, 0).item())
        assert row["label"] == labels[i]
        for way, logits in (("predicted", forecast.logits[i]), ("measured", measured[i])):
            others = [k for k in range(5) if k != labels[i]]
            before, after = (z[labels[i]] - z[others].max() for z in (forecast.logits_before[i], logits))
            assert row[f"margin_{way}"] == pytest.approx((after - before).item())
            assert row[f"broken_{way}"] == bool(before > 0 >= after)
    hits = (table["broken_predicted"] & table["broken_measured"]).sum()
    assert table["broken_measured"].sum() > 0
    assert found.calibration.broken_recall == pytest.approx(hits / table["broken_measured"].sum())
    assert found.calibration == forecast.compare(measured)


def test_by_class(case):
    *_, forecast, measured = case
    table, labels = fc.compare_drift(forecast, measured).per_class, forecast.labels
    assert list(table.index) == [0, 1]
    for way, logits in (("predicted", forecast.logits), ("measured", measured)):
        rise = cross_entropy(logits, labels) - cross_entropy(forecast.logits_before, labels)
        assert (table[f"rise_{way}"] * table["samples"]).sum() / 40 == pytest.approx(rise.item())
        right = (logits.argmax(1) == labels)[labels == 1].double().mean()
        assert table[f"accuracy_{way}"][1] == pytest.approx(right.item())
    assert list(table["accuracy_before"]) == pytest.approx(list(forecast.per_class["accuracy_before"]))


def test_by_direction(case):
    *_, forecast, measured = case
    found = fc.compare_drift(forecast, measured)
    table, actual = found.per_direction, measured - forecast.logits_before
    values = torch.linalg.svdvals(actual)
    assert list(table["measured"]) == pytest.approx((values.square() / values.square().sum()).tolist())
    assert table["predicted"].sum() == pytest.approx(1.0)  # five outputs span all
    for k, row in table.iterrows():
        along, truth = forecast.drift @ found.directions[k], actual @ found.directions[k]
        assert row["cosine"] == pytest.approx(torch.cosine_similarity(along, truth, 0).item(), abs=1e-9)
    # what the directions leave of both drifts together is the relative error
    pairs = (
        table["predicted"].to_numpy() * forecast.drift.square().sum().item(),
        table["measured"].to_numpy() * (actual.square().sum().item()),
    )
    error = pairs[0] + pairs[1] - 2 * table["cosine"].to_numpy() * (pairs[0] * pairs[1]) ** 0.5
    assert (error.sum() / pairs[1].sum()) ** 0.5 == pytest.approx(found.calibration.relative_error)


def test_by_mode(case):
    model, old, _, forecast, measured = case
    tangent = TangentOperator(model, old[0], trainable(model))
    delta = torch.cat([forecast.end.theta - forecast.start.theta, *_head_change(forecast)])
    modes = network_modes(tangent, delta, k=6)
    table = fc.compare_drift(forecast, measured, modes).per_mode
    J = dense_jacobian(model, old[0], dict(model.named_parameters()))[0].flatten(0, 1)
    values, vectors = torch.linalg.eigh(J @ J.T)
    leading = vectors.flip(1)[:, :6]
    assert list(table["eigenvalue"]) == pytest.approx(values.flip(0)[:6].tolist(), rel=1e-4)
    for way, drift in (("predicted", forecast.drift), ("measured", measured - forecast.logits_before)):
        energy = (leading.T @ drift.flatten()).square() / drift.square().sum()
        assert list(table[way]) == pytest.approx(energy.tolist(), abs=1e-3)
    with pytest.raises(ValueError, match="modes over .* old outputs .*; expected .* own old samples"):
        fc.compare_drift(
            replace(forecast, drift=forecast.drift[:9], logits_before=forecast.logits_before[:9], targets=None),
            measured[:9],
            modes,
        )


def _head_change(forecast):
    for name in ("weight", "bias"):
        yield (getattr(forecast.end, name) - getattr(forecast.start, name)).flatten()


def test_without_labels_there_is_drift_alone(case):
    *_, forecast, measured = case
    for targets in (None, torch.zeros_like(measured)):
        found = fc.compare_drift(replace(forecast, targets=targets), measured)
        assert found.per_class is None
        assert list(found.per_sample) == ["predicted", "measured", "cosine"]
        assert found.calibration.accuracy is None


def test_nothing_that_moves(case):
    *_, forecast, _ = case
    found = fc.compare_drift(forecast, forecast.logits_before)
    assert found.per_sample["measured"].max() == 0
    assert found.per_sample["cosine"].isna().all()
    assert found.per_direction["measured"].max() == 0
    assert not found.per_sample["broken_measured"].any()


def test_what_was_measured_has_to_fit(case):
    *_, forecast, measured = case
    with pytest.raises(ValueError, match=r"shape \(39, 5\) .*; expected .* Measure"):
        fc.compare_drift(forecast, measured[1:])
    with pytest.raises(ValueError, match="holds nan"):
        fc.compare_drift(forecast, measured * torch.nan)


def test_layers_alone_and_missing(case):
    model, old, _, forecast, _ = case
    table = fc.drift_by_layer(model, old, forecast)
    assert list(table.index) == ["0", "2", "4"]
    end = deepcopy(model)
    net_end = dict(zip(("0", "2"), torch.split(forecast.end.theta, [63, 70]), strict=True))
    with torch.no_grad():
        for name, values in net_end.items():
            layer = end[int(name)]
            layer.weight.copy_(values[: layer.weight.numel()].view_as(layer.weight))
            layer.bias.copy_(values[layer.weight.numel() :])
        end[4].weight.copy_(forecast.end.weight)
        end[4].bias.copy_(forecast.end.bias)
    whole = measured_drift(model, end, old)
    assert torch.allclose(whole, forecast.drift)
    for name, row in table.iterrows():
        alone, missing = deepcopy(model), deepcopy(end)
        alone[int(name)].load_state_dict(end[int(name)].state_dict())
        missing[int(name)].load_state_dict(model[int(name)].state_dict())
        for way, other in (("alone", alone), ("missing", missing)):
            drift = measured_drift(model, other, old)
            assert row[way] == pytest.approx((drift.norm() / whole.norm()).item())
            assert row[f"{way}_cosine"] == pytest.approx(
                torch.cosine_similarity(drift.flatten(), whole.flatten(), 0).item()
            )
        assert row["share"] == pytest.approx(row["alone"] * row["alone_cosine"])
        assert row["parameters"] == sum(p.numel() for p in model[int(name)].parameters())
    one = fc.drift_by_layer(model, old, forecast, groups=lambda _: "all").loc["all"]
    assert (one["share"], one["alone"], one["missing"]) == pytest.approx((1, 1, 0))
    tensors = fc.drift_by_layer(model, old, forecast, groups=lambda name: name)
    assert list(tensors.index) == [name for name, _ in model.named_parameters()]


class Branches(nn.Module):
    """Two branches and a scale that nothing multiplies: linear in all that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.left(x) + self.right(x.tanh()) + self.shift


def linear_case(estimator="anchored"):
    torch.manual_seed(1)
    model = Branches().double()
    old = torch.randn(20, 4, dtype=DOUBLE), torch.randint(0, 2, (20,))
    new = torch.randn(30, 4, dtype=DOUBLE), torch.randint(0, 3, (30,))
    return model, old, fc.forecast(model, old, new, fc.SGD(0.2, 10, batch_size=10), estimator=estimator, budget=1)


@pytest.mark.parametrize("estimator", ["anchored", "pilot"])
def test_shares_add_up_where_layers_do_not_act_together(estimator):
    model, old, forecast = linear_case(estimator)
    table = fc.drift_by_layer(model, old, forecast)
    assert list(table.index) == ["shift", "left", "right"]
    assert table["share"].sum() == pytest.approx(1.0)
    assert table["moved"]["shift"] == float("inf")  # from zero
    for _, row in table.iterrows():  # without a part there is the rest
        rest = 1 + row["alone"] ** 2 - 2 * row["share"]
        assert row["missing"] == pytest.approx(rest**0.5)


def test_a_kernel_moves_only_where_the_model_is_not_linear(case):
    model, old, forecast = linear_case()
    table = fc.kernel_movement(model, old, forecast)
    assert table["change"].max() < 1e-12
    assert table["alignment"].min() == pytest.approx(1.0)
    model, old, _, forecast, _ = case
    some = old[0][:9]
    found = fc.kernel_movement(model, some, forecast)
    assert list(found.index) == ["0", "2", "4", "all"]
    net, kernels = forecast._net, []
    for place in (forecast.start, forecast.end):
        with net.restored():
            net.put(place.theta, place.weight, place.bias)
            J = dense_jacobian(model, some, dict(model.named_parameters()))[0]
        parts = [*torch.split(J, [63, 70, 40], 2), J]
        kernels.append([torch.einsum("icp,jcp->ij", part, part) / 5 for part in parts])
    H = torch.eye(9, dtype=DOUBLE) - 1 / 9
    for name, was, now in zip(found.index, *kernels, strict=True):
        row = found.loc[name]
        assert row["before"] == pytest.approx(was.norm().item())
        assert row["after"] == pytest.approx(now.norm().item())
        assert row["change"] == pytest.approx(((now - was).norm() / was.norm()).item())
        assert row["alignment"] == pytest.approx(torch.cosine_similarity(was.flatten(), now.flatten(), 0).item())
        centred = [(H @ kernel @ H).flatten() for kernel in (was, now)]
        assert row["centred"] == pytest.approx(torch.cosine_similarity(*centred, 0).item())
    assert found["change"]["all"] > 1e-3


def test_a_kernel_that_is_zero_at_the_start():
    """A fresh head with equal rows: the body has no tangent there."""
    model, old, new = network_and_task("perceptron", old=30, new=60)
    with torch.no_grad():
        model[4].weight.zero_()
    forecast = fc.forecast(model, old, new, TRAINING, budget=0.6)
    table = fc.kernel_movement(model, old, forecast)
    assert table["before"]["0"] == 0 < table["after"]["0"]
    assert table["change"]["0"] == float("inf")
    assert table["alignment"].isna().tolist() == [True, True, False, False]
    still = fc.forecast(model, old, new, replace(TRAINING, steps=0), estimator="anchored")
    layers = fc.drift_by_layer(model, old, still)
    assert layers["share"].tolist() == [0, 0, 0]
    assert layers["alone_cosine"].isna().all()


def test_the_model_is_put_back_and_may_have_been_trained(case):
    given, old, new, _, _ = case
    model = deepcopy(given)
    forecast = fc.forecast(model, old, new, TRAINING, budget=0.6)
    first = fc.drift_by_layer(model, old, forecast), fc.kernel_movement(model, old, forecast)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    after = deepcopy(model.state_dict())
    second = fc.drift_by_layer(model, old, forecast), fc.kernel_movement(model, old, forecast)
    for left, right in zip(first, second, strict=True):
        assert left.equals(right)
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_another_model_or_other_samples_are_refused(case):
    model, old, _, forecast, _ = case
    for diagnose in (fc.drift_by_layer, fc.kernel_movement):
        with pytest.raises(ValueError, match="not the model of the forecast; expected .* not a copy"):
            diagnose(deepcopy(model), old, forecast)
    with pytest.raises(ValueError, match=r"old samples with other features .* Give the same `old`"):
        fc.drift_by_layer(model, (old[0].flip(0), old[1]), forecast)
    with pytest.raises(ValueError, match=r"of shape \(39, 7\), than the forecast's, \(40, 7\)"):
        fc.drift_by_layer(model, old[0][1:], forecast)


def test_names_of_blocks():
    assert block_of("0.model.encoder.layer.3.attention.self.query.lora_B.default.weight") == "0.model.encoder.layer.3"
    assert block_of("1.weight") == "1"
    assert block_of("model.pooler.dense.bias") == "model.pooler.dense"
    assert block_of("prompts.0") == "prompts"
    assert block_of("scale") == "scale"
