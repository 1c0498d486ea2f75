"""Other learning rates and lengths of the same training, read off the same path: no pass, no model, no data."""

from dataclasses import replace

import pytest
import torch
from small_networks import NEW, network_and_task

import forgetcast as fc
from builders import relative_error

RUN = fc.AdamW(6e-3, 24, batch_size=10)
ORDER = [[(9 * k + j) % 60 for j in range(5 + k % 2)] for k in range(8)]
TRAININGS = {
    "adam": RUN,
    "adam, decay, clipped": replace(RUN, weight_decay=0.1, max_gradient_norm=0.2),
    "momentum": fc.SGD(0.05, 24, batch_size=10, momentum=0.9, classes=NEW),
    "full batch": fc.GradientDescent(0.1, 24, loss="cross_entropy", classes=NEW),
    "order": fc.SGD(0.1, 8, order=ORDER, classes=NEW),
}


def made(training, *, head="as_is", dtype=torch.float64, old=30):
    model, old, new = network_and_task("perceptron", old=old, new=60, dtype=dtype)
    with torch.no_grad():
        model[4].bias[:2] += 1.0
        old = old[0], model(old[0])[:, :2].argmax(1)  # so that it answers most rightly
    return model, fc.forecast(model, old, new, training, budget=0.9, estimator="anchored", head=head)


@pytest.fixture(scope="module")
def run():
    return made(RUN)[1]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float64) for name in TRAININGS if name != "order"), ("adam", torch.float32)]
)
def test_the_same_training_is_the_forecast_itself(name, dtype):
    _, forecast = made(TRAININGS[name], dtype=dtype)
    same = forecast.what_if(learning_rate=TRAININGS[name].learning_rate, steps=24)
    for found in (same, forecast.what_if()):
        assert relative_error(found.drift, forecast.drift) < (1e-9 if dtype == torch.float64 else 1e-4)
        assert found.accuracy == forecast.accuracy
        assert found.trust.expected_cosine == pytest.approx(forecast.trust.expected_cosine, rel=1e-3)
    assert forecast.relative_drift > 0.01


@pytest.mark.parametrize("head", ["as_is", "placed"])
def test_a_shorter_training_is_the_reading_there(head):
    _, forecast = made(RUN, head=head)
    table = forecast.trajectory
    assert len(table) > 2
    assert list(table["steps"]) == [reading.step for reading in forecast.readings]
    for reading, row in zip(forecast.readings, table.itertuples(), strict=True):
        shorter = forecast.what_if(steps=reading.step)
        assert relative_error(shorter.logits, reading.logits) < 1e-9
        assert shorter.relative_drift == pytest.approx(row.relative_drift, rel=1e-7, abs=1e-12)
        assert shorter.accuracy == row.accuracy
        assert shorter.training == replace(RUN, steps=reading.step)
    assert table["relative_drift"][0] == 0
    assert table["accuracy"].iloc[-1] == forecast.accuracy


def test_a_smaller_rate_drifts_less_and_a_tiny_one_not(run):
    rates = [1e-7, 1e-3, 2e-3, 4e-3]
    drifts = [run.what_if(learning_rate=rate).relative_drift for rate in rates]
    assert drifts == sorted(drifts)
    assert drifts[0] < 1e-3 * drifts[-1]
    assert run.what_if(steps=0).drift.abs().max() == 0


@pytest.mark.usefixtures("unchecked_types")
def test_what_it_says_is_near_what_a_forecast_of_its_own_says():
    """Median over seeds of the cosine between both."""
    cosines = []
    for seed in range(3):
        model, old, new = network_and_task("perceptron", old=12, new=60, seed=seed)
        whole = fc.forecast(model, old, new, RUN, budget=0.9)
        alone = fc.forecast(model, old, new, replace(RUN, learning_rate=2e-3), budget=0.9)
        varied = whole.what_if(learning_rate=2e-3)
        cosines.append(torch.cosine_similarity(varied.drift.flatten(), alone.drift.flatten(), 0).item())
    assert torch.tensor(cosines).median() > 0.9


def test_model_and_data_are_not_touched():
    model, forecast = made(RUN)
    first = forecast.what_if(learning_rate=1e-3, steps=30), forecast.safe(0.1), forecast.trajectory
    calls = []

    def refused(*given):
        calls.append(given)
        raise AssertionError("the model is asked")

    model.forward = refused
    for layer in model:
        layer.forward = refused
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    second = forecast.what_if(learning_rate=1e-3, steps=30), forecast.safe(0.1), forecast.trajectory
    assert calls == []
    assert torch.equal(first[0].drift, second[0].drift)
    assert first[1].table.equals(second[1].table)
    assert first[2].equals(second[2])
    assert all(bool(parameter.isnan().all()) for parameter in model.parameters())
    assert first[0].cost.passes == {"old": 0, "new": 0}
    assert first[0].share_of_run == 0
    assert first[0].settings["what_if"]


def test_a_what_if_of_a_what_if_is_that_of_the_forecast(run):
    direct = run.what_if(learning_rate=2e-3, steps=20)
    again = run.what_if(learning_rate=2e-3).what_if(steps=20)
    assert relative_error(again.drift, direct.drift) < 1e-9
    back = run.what_if(learning_rate=2e-3).what_if(learning_rate=RUN.learning_rate)
    assert relative_error(back.drift, run.drift) < 0.05  # turns are rounded to steps


def test_the_frontier(run):
    frontiers = [run.safe(drop) for drop in (0.0, 0.05, 0.1, 0.2, 0.4, 1.0)]
    steps = [frontier.steps for frontier in frontiers]
    assert steps == sorted(steps)
    assert steps[-1] == 24
    for frontier in frontiers:
        table = frontier.table
        assert list(table) == ["steps", "old_accuracy", "drop", "new_accuracy"]
        assert table.equals(frontiers[0].table)
        assert frontier.learning_rate == RUN.learning_rate
        upto = table[table["steps"] <= frontier.steps]
        assert upto["drop"].max() <= frontier.max_drop + 1e-12
        later = table[table["steps"] > frontier.steps]
        assert not len(later) or later["drop"].iloc[0] > frontier.max_drop
        row = table[table["steps"] == frontier.steps].iloc[0]
        assert (row["old_accuracy"], row["new_accuracy"]) == (frontier.old_accuracy, frontier.new_accuracy)
    table = frontiers[0].table
    assert table["steps"].iloc[0] == 0
    assert table["steps"].is_monotonic_increasing
    assert table["steps"].is_unique
    assert table["drop"].to_numpy() == pytest.approx(run.accuracy_before - table["old_accuracy"].to_numpy())
    assert table["old_accuracy"].iloc[-1] == run.accuracy
    assert table["new_accuracy"].between(0, 1).all()
    for step in table["steps"][::5]:
        assert run.what_if(steps=int(step)).accuracy == table.set_index("steps")["old_accuracy"][step]


def test_some_limit_lies_between(run):
    """Else the test above would compare nothing."""
    assert run.accuracy < run.accuracy_before
    assert run.safe(0.0).steps < 24


@pytest.mark.parametrize(
    ("settings", "training"),
    [
        ({"estimator": "pilot", "budget": 0.9}, RUN),
        ({"estimator": "anchored", "budget": 1}, RUN),
        ({"estimator": "static"}, fc.GradientDescent(0.01, 5)),
        ({"estimator": "linear", "parameters": ["4.weight", "4.bias"]}, RUN),
    ],
    ids=["pilot", "the run", "static", "linear"],
)
def test_forecasts_without_surrogates_say_so(settings, training):
    model, old, new = network_and_task("perceptron", new=40)
    forecast = fc.forecast(model, old, new, training, **settings)
    name = settings["estimator"]
    for asked in (lambda: forecast.what_if(steps=3), lambda: forecast.safe(0.1)):
        with pytest.raises(ValueError, match=f"a what-if of a {name} forecast; expected an anchored .* Ask for est"):
            asked()


def test_schedules_orders_and_numbers_that_do_not_fit(run, unchecked_types):
    rates = [4e-3 * (1 - k / 24) for k in range(24)]
    _, scheduled = made(replace(RUN, learning_rate=rates))
    with pytest.raises(
        ValueError, match="a schedule of learning rates; expected one learning rate. Give learning_rate"
    ):
        scheduled.what_if(steps=10)
    assert scheduled.what_if(learning_rate=2e-3, steps=10).relative_drift > 0
    assert scheduled.safe(1.0).steps == 24  # a frontier of the schedule itself
    _, ordered = made(TRAININGS["order"], old=4)
    assert ordered.what_if(steps=2).training.order == ORDER[:2]
    with pytest.raises(ValueError, match="got steps=9; expected at most 8. The order ends there"):
        ordered.what_if(steps=9)
    for wrong in ({"steps": -1}, {"steps": 2.5}, {"learning_rate": -1.0}, {"learning_rate": float("nan")}):
        with pytest.raises(ValueError, match=f"got {next(iter(wrong))}=.*; expected .*Correct"):
            run.what_if(**wrong)
    for drop in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="got max_drop=.*; expected .*Correct"):
            run.safe(drop)


def test_a_frontier_needs_labels():
    model, old, new = network_and_task("perceptron", new=60)
    forecast = fc.forecast(model, (old[0], None), new, RUN, budget=0.9)
    assert forecast.what_if(steps=10).relative_drift > 0
    assert list(forecast.trajectory) == ["steps", "relative_drift"]
    for asked in (lambda: forecast.safe(0.1), lambda: forecast.accuracy, lambda: forecast.interval):
        with pytest.raises(ValueError, match="no old targets; expected integer labels .* Give labels, or read drift"):
            asked()
