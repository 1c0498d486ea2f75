"""How many modules train: identities with frozen and initialized training, the guard, what is kept and told."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import stream
from torch import nn

from forgetcast.heads.linear import Linear
from forgetcast.learn.checkpoint import Checkpointing
from forgetcast.learn.loop import learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.adaptive import Adaptive
from forgetcast.methods.base import Model
from forgetcast.methods.frozen import Frozen
from forgetcast.methods.registry import method_class
from forgetcast.modes import training_mode
from forgetcast.protect.magnitude import LastModules, SimilarModulesRest, least_similar, trained_modules
from forgetcast.streams.domains import domain_incremental

OPTIMIZATION = Optimization("sgd", learning_rate=0.05, epochs=3, batch_size=32, momentum=0.9)


def model(width: int = 12) -> Model:
    torch.manual_seed(7)
    layers = [nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, width)]
    return Model(nn.Sequential(*layers), Linear(width))


def after(method, tasks=None) -> dict[str, torch.Tensor]:
    learn(method, stream() if tasks is None else tasks, OPTIMIZATION, seed=2)
    return {name: value.clone() for name, value in method.model.state_dict().items()}


def same(first, second) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def trained(method) -> list[list[str]]:
    return [decision["trained"] for decision in method.decided()]


def twice():
    """Two tasks that are one."""
    return domain_incremental([stream().source, stream().source], seed=1)


def test_all_modules_are_initialized_training_bit_for_bit():
    whole = after(method_class("initialized")(model()))
    assert same(whole, after(Adaptive(model(), low=1.0, high=1.0, guard=None)))
    assert same(whole, after(Frozen(model(), 4)))


def test_no_module_is_frozen_training_bit_for_bit():
    adaptive = Adaptive(model(), least=0, low=-1.0, high=-1.0, guard=None)
    assert same(after(Frozen(model())), after(adaptive))
    assert trained(adaptive) == [["0", "1", "3", "5"], [], []]


@pytest.mark.parametrize(("order", "rows"), [("last", "own"), ("cosine", "own"), ("last", "joint")])
@pytest.mark.parametrize("least", [1, 3])
def test_the_same_task_again_trains_the_last(least, order, rows):
    frozen, adaptive = Frozen(model(), least), Adaptive(model(), least=least, order=order, rows=rows)
    assert same(after(frozen, twice()), after(adaptive, twice()))
    assert trained(adaptive)[1] == ["0", "1", "3", "5"][-least:]
    decision = adaptive.decided()[1]
    assert decision["cosine"] == pytest.approx(1, abs=1e-6)
    assert decision["text"].startswith(f"task 1: {least} of 4 modules train, because its gradient has cosine 1.00")


@pytest.mark.parametrize("rows", ["own", "joint"])
def test_a_resumed_run_chooses_alike(rows, tmp_path):
    def made() -> Adaptive:
        return Adaptive(model(), low=-1.0, high=1.0, rows=rows)

    whole = after(uninterrupted := made())
    checkpointing = Checkpointing(tmp_path)
    learn(made(), stream(), OPTIMIZATION, seed=2, checkpointing=checkpointing, until=2)
    resumed = made()
    learn(resumed, stream(), OPTIMIZATION, seed=2, checkpointing=checkpointing)
    assert resumed.decided() == uninterrupted.decided()
    assert same(whole, resumed.model.state_dict())


def test_joint_rows_keep_samples_of_the_last_task_alone():
    method = Adaptive(model(), rows="joint", samples=50)
    learn(method, stream(), OPTIMIZATION, seed=2, until=2)
    (rest,) = method.protections
    inputs, labels = rest.kept
    assert len(inputs) == len(labels) == 50
    assert set(labels.tolist()) == set(stream().tasks[1].classes)
    assert not rest.last
    assert Adaptive(model()).protections[0].kept is None


def test_parameters_and_statistics_of_resting_modules_stand_still():
    method = Frozen(model(), 1)
    learn(method, stream(), OPTIMIZATION, seed=2, until=1)
    before = {name: value.clone() for name, value in method.model.state_dict().items()}
    learn(again := Frozen(model(), 1), stream(), OPTIMIZATION, seed=2)
    moved = {
        name
        for name, value in again.model.state_dict().items()
        if not torch.equal(before[name], value[: len(before[name])] if value.ndim else value)
    }
    assert moved == {"backbone.5.weight", "backbone.5.bias", "head.weight", "head.bias"}


def test_badly_learnt_features_train_however_alike_the_tasks_are():
    narrow = nn.Sequential(nn.Linear(64, 1), nn.Tanh(), nn.Linear(1, 12))  # two classes at most can be told apart
    method = Adaptive(Model(narrow, Linear(12)), low=-1.0, high=-1.0, guard=0.3)
    learn(method, stream(), OPTIMIZATION, seed=2)
    second = method.decided()[1]
    assert second["trained"] == ["0", "2"]
    assert "features as they are do badly" in second["reason"]
    assert second["probe_error"] > second["usual_error"]
    rests = Adaptive(model(), low=-1.0, high=-1.0, guard=0.3)
    learn(rests, twice(), OPTIMIZATION, seed=2)
    assert trained(rests)[1] == []


def test_tasks_of_one_class_train_everything_and_say_why():
    source = stream().source
    from forgetcast.streams.scenarios import class_incremental

    method = Adaptive(model(), low=-1.0, high=-1.0)
    learn(method, class_incremental(source, 1, seed=0), OPTIMIZATION, seed=2, until=2)
    assert trained(method)[1] == ["0", "1", "3", "5"]
    assert "no gradient to compare" in method.decided()[1]["reason"]


def test_a_stream_of_one_task_trains_everything():
    method = Adaptive(model())
    learn(method, stream(), OPTIMIZATION, seed=2, until=1)
    assert trained(method) == [["0", "1", "3", "5"]]


def test_decisions_are_events():
    seen = []
    method = Adaptive(model())
    learn(method, stream(), OPTIMIZATION, seed=2, on_event=seen.append)
    found = [event for event in seen if event["event"] == "decision"]
    assert [
        {key: value for key, value in event.items() if key not in ("event", "run_step")} for event in found
    ] == method.decided()
    assert [event["task"] for event in found] == [0, 1, 2]
    assert set(found[1]["cosines"]) == {"0", "1", "3", "5"}


def test_sketches_choose_alike():
    exact, kept = Adaptive(model()), Adaptive(model(), sketch=4096)
    assert same(after(exact), after(kept))
    numbers = sum(value.numel() for value in Adaptive(model()).model.backbone.parameters())
    assert numbers < 4096  # shorter ones are whole
    few = Adaptive(model(), sketch=64)
    after(few)
    assert all(len(part) <= 64 for part in few.protections[0].last.values())


@given(st.floats(-1, 1), st.floats(-1, 1), st.integers(1, 30), st.data())
def test_more_alike_never_trains_more(first, second, modules, data):
    least = data.draw(st.integers(0, modules))
    low, high = sorted(data.draw(st.tuples(st.floats(-1, 1), st.floats(-1, 1))))
    few, many = (trained_modules(cosine, modules, least, low, high) for cosine in sorted((first, second), reverse=True))
    assert least <= few <= many <= modules
    assert trained_modules(1.0, modules, least, low, high) == least
    if low > -1:
        assert trained_modules(-1.0, modules, least, low, high) == modules


@pytest.mark.parametrize("order", ["last", "cosine"])
def test_which_modules_train(order):
    method = Adaptive(model(), low=-1.0, high=1.0, order=order, guard=None)
    learn(method, stream(), OPTIMIZATION, seed=2)
    for decision in method.decided()[1:]:
        names, count = list(decision["cosines"]), len(decision["trained"])
        assert count == trained_modules(decision["cosine"], 4, 0, -1.0, 1.0)
        assert 0 < count < 4
        wanted = sorted(names, key=decision["cosines"].get)[:count] if order == "cosine" else names[-count:]
        assert set(decision["trained"]) == set(wanted)


def test_the_least_similar_in_the_order_of_the_model():
    cosines = {"a": 0.5, "b": -0.1, "c": 0.5, "d": 0.2}
    assert [least_similar(cosines, count) for count in range(5)] == [
        (),
        ("b",),
        ("b", "d"),
        ("b", "c", "d"),
        ("a", "b", "c", "d"),
    ]


def test_training_mode_leaves_frozen_normalisations():
    free = nn.BatchNorm1d(3, affine=False)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3).requires_grad_(False), free, nn.Dropout()).eval()
    training_mode(net)
    assert [module.training for module in net] == [True, False, True, True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LastModules(-1), "specific"),
        (lambda: SimilarModulesRest(-1), "least"),
        (lambda: SimilarModulesRest(low=0.5, high=0.4), "high"),
        (lambda: SimilarModulesRest(low=-1.5), "low"),
        (lambda: SimilarModulesRest(metric="angle"), "metric"),
        (lambda: SimilarModulesRest(order="first"), "order"),
        (lambda: SimilarModulesRest(rows="shared"), "rows"),
        (lambda: SimilarModulesRest(guard=float("nan")), "guard"),
        (lambda: SimilarModulesRest(samples=1), "samples"),
        (lambda: SimilarModulesRest(sketch=0), "sketch"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: Frozen(model(), 5), "specific=5 of 4 modules"),
        (lambda: Adaptive(model(), least=5), "least=5 of 4 modules"),
        (lambda: Frozen(Model(model().backbone.requires_grad_(False), Linear(12))), "no parameter that trains"),
        (lambda: Adaptive(Model(model().backbone.requires_grad_(False), Linear(12))), "no parameter that trains"),
        (lambda: Adaptive(model(), modules=["5.*"]), "in the modules"),
    ],
)
def test_models_that_do_not_fit(method, message):
    with pytest.raises(ValueError, match=message):
        learn(method(), stream(), OPTIMIZATION, seed=2)
