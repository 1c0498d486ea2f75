"""OSF through whole transformers, of images and of padded texts: leading directions stay, whatever the optimiser."""

import io

import pytest
import torch
from small_runs import check_rows, check_stopped_within_a_task
from test_inflora import ADAMW, WIDTH, copied, pretrained, read, source, stream, task_of, train
from torch import Tensor

pytest.importorskip("peft")

from forgetcast.heads.linear import Linear
from forgetcast.learn.loop import learn
from forgetcast.methods.base import Model
from forgetcast.methods.osf import OSF
from forgetcast.methods.registry import create
from forgetcast.streams.domains import domain_incremental
from forgetcast.tuners.split import split_layers

KINDS = ("vit", "bert")
RANKS = (0.3, 0.5)


def method(kind: str = "vit", **options) -> OSF:
    return OSF(Model(pretrained(kind), Linear(WIDTH)), **{"ranks": RANKS} | options)


def weights(made: OSF) -> dict[str, Tensor]:
    """Of the layers that OSF is about, while they are plain."""
    return {name: made.model.backbone.get_submodule(name).weight.detach().clone() for name in made.names}


def changes(made: OSF, start: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each split layer how far its weight is from its start, and the leading directions of that, as peft froze
    them: in float32."""
    found = []
    for name, layer in split_layers(made.model.backbone):
        left, _, right = torch.linalg.svd(start[name], full_matrices=False)
        rank = int(min(start[name].shape) * made.rank)
        up, scale, down = (layer.osf_svd_params.default[f"{factor}_low"].detach().double() for factor in "USV")
        first = [getattr(layer, f"_osf_{factor}_low_init")["default"].double() for factor in "USV"]
        change = up * scale @ down - first[0] * first[1] @ first[2]
        found.append((change, left[:, :rank].double(), right[:rank].double()))
    return found


def leak(made: OSF, start: dict[str, Tensor]) -> float:
    """The largest share of a change that lies in leading directions, on either side."""
    sides = [
        (float((left.T @ change).norm() / change.norm()), float((change @ right.T).norm() / change.norm()))
        for change, left, right in changes(made, start)
    ]
    return max(max(pair) for pair in sides)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_of_tasks(kind):
    """It begins as what was there; every step is outside the leading directions; all that trains moves and no other bit
    does; joined, it answers the same, and the leading triplets of before are still what they were."""
    made, tasks = method(kind), stream(kind)
    plain_keys = made.model.backbone.state_dict().keys()
    for index, rank in enumerate((0.3, 0.5, 0.5)):
        task, (inputs, _) = task_of(tasks, index), read(tasks, index)
        start, phi = weights(made), made.model.features(inputs)
        made.begin_task(task)
        assert made.rank == rank
        torch.testing.assert_close(made.model.features(inputs), phi, atol=1e-6, rtol=1e-6)
        for name, layer in split_layers(made.model.backbone):
            least = min(start[name].shape)
            assert len(layer.osf_svd_params.default.S_low) == least - int(rank * least)
        before = copied(made.model)
        for _ in range(3):
            train(made, task, epochs=1)
            assert min(change.norm() for change, _, _ in changes(made, start)) > 1e-2
            assert leak(made, start) < 1e-6
        after = copied(made.model)
        training = {name for name, value in made.model.named_parameters() if value.requires_grad}
        assert {name for name in after if not torch.equal(after[name], before[name])} == training
        assert len(training) == 3 * len(made.names) + 2
        old = [output for output in task.seen if output not in task.classes]
        assert torch.equal(after["head.weight"][old], before["head.weight"][old])
        unmerged = made.predict(inputs)
        known = changes(made, start)
        made.end_task(task)
        torch.testing.assert_close(made.predict(inputs), unmerged, atol=1e-5, rtol=1e-5)
        assert made.model.backbone.state_dict().keys() == plain_keys
        assert list(split_layers(made.model.backbone)) == []
        for (name, weight), (_, left, right) in zip(weights(made).items(), known, strict=True):
            torch.testing.assert_close(weight @ right.T.float(), start[name] @ right.T.float(), atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(left.T.float() @ weight, left.T.float() @ start[name], atol=2e-6, rtol=1e-5)
    elsewhere = {f"{name}.weight" for name in made.names}
    untouched = pretrained(kind).state_dict()
    end = made.model.backbone.state_dict()
    assert {name for name, value in untouched.items() if not torch.equal(end[name], value)} == elsewhere


def sgd_run(projected: str) -> dict[str, Tensor]:
    made, task = method(projected=projected), task_of(stream("vit"), 0)
    made.begin_task(task)
    optimizer = torch.optim.SGD(made.parameter_groups(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for _ in range(4):
        for batch in task.batches():
            optimizer.zero_grad()
            made.loss(batch).backward()
            made.after_backward()
            optimizer.step()
            made.after_step()
    return copied(made.model)


def test_for_sgd_projected_gradients_are_projected_steps():
    steps, gradients = sgd_run("step"), sgd_run("gradient")
    assert steps.keys() == gradients.keys()
    for name, value in steps.items():
        torch.testing.assert_close(value, gradients[name], atol=1e-5, rtol=1e-4)


def test_adam_leaves_the_space_of_projected_gradients():
    """What `peft` does alone, and why steps are projected here."""
    shares = {}
    for projected in ("step", "gradient"):
        made, task = method(projected=projected), task_of(stream("vit"), 0)
        start = weights(made)
        made.begin_task(task)
        train(made, task, epochs=2)
        shares[projected] = leak(made, start)
    assert shares["step"] < 1e-6
    assert shares["gradient"] > 0.05


@pytest.mark.parametrize("projected", ["step", "gradient"])
@pytest.mark.parametrize("begun", [False, True])
def test_resumed_within_a_task_and_between_two(projected, begun):
    whole, first, task = method(projected=projected), task_of(stream("vit"), 0), task_of(stream("vit"), 1)
    whole.begin_task(first)
    train(whole, first, 1)
    whole.end_task(first)
    if begun:
        whole.begin_task(task)
        train(whole, task, 1)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    torch.manual_seed(77)
    resumed = method(projected=projected)  # whose layers are split at another rank
    resumed.begin_task(first)
    resumed.load_state_dict(state)
    assert resumed.rank == whole.rank
    assert resumed.state_dict().keys() == whole.state_dict().keys()
    for made in (whole, resumed):
        if not begun:
            made.begin_task(task)
        train(made, task, 2)
        made.end_task(task)
    ours, theirs = copied(whole.model), copied(resumed.model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_stopped_within_a_task_is_the_whole_run(tmp_path):
    check_stopped_within_a_task(method, stream("vit"), tmp_path)


def test_each_row_of_an_answer_is_of_its_own_input():
    made = method()
    learn(made, stream("vit"), ADAMW, until=2)
    check_rows(made, stream("vit"))


def test_memory_is_the_same_after_any_number_of_tasks():
    made, sizes = method(), []
    for index in range(3):
        task = task_of(stream("vit"), index)
        made.begin_task(task)
        made.end_task(task)
        sizes.append(sum(value.numel() for value in made.model.backbone.state_dict().values()))
    assert sizes == [sum(value.numel() for value in pretrained("vit").state_dict().values())] * 3


def test_named_targets_alone_move():
    made = method(targets=("query", "value"), layers=[1], ranks=(3,))
    start = copied(made.model.backbone)
    learn(made, stream("vit"), ADAMW, until=1)
    end = copied(made.model.backbone)
    moved = {name for name, value in start.items() if not torch.equal(end[name], value)}
    assert moved == {f"{name}.weight" for name in made.names}
    assert len(moved) == 2


@pytest.mark.parametrize(("head", "moves"), [("rows", False), ("free", True)])
def test_a_free_head_learns_on_where_classes_come_again(head, moves):
    tasks = domain_incremental([source("vit"), source("vit", 1)], seed=0, test_share=0.25)
    made = method(head=head)
    for index in range(2):
        task, before = task_of(tasks, index), copied(made.model.head)
        made.begin_task(task)
        train(made, task, epochs=1)
        made.end_task(task)
    assert torch.equal(before["weight"], made.model.head.weight) != moves


@pytest.mark.parametrize("projected", ["step", "gradient"])
def test_gradients_or_steps_are_projected_and_never_both(projected):
    """A copy of a model has no hooks: where steps are projected it must train as the model does."""
    made, task = method(projected=projected), task_of(stream("vit"), 0)
    start = weights(made)
    made.begin_task(task)
    optimizer = torch.optim.SGD(made.parameter_groups(), lr=1.0)
    for batch in task.batches():
        optimizer.zero_grad()
        made.loss(batch).backward()
        optimizer.step()  # and nothing after it
    assert leak(made, start) < 1e-4 if projected == "gradient" else leak(made, start) > 0.05


def test_a_forecast_follows_steps_and_no_projected_gradients():
    task = task_of(stream("vit"), 0)
    for projected, outputs in (("step", task.classes), ("gradient", None)):
        made = method(projected=projected)
        made.begin_task(task)
        assert made.plain_outputs() == outputs
        assert [p.restraint(made.model) is not None for p in made.protections] == [True] * len(made.protections)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "projected"}, "head='projected'; expected one of"),
        ({"projected": "steps"}, "Did you mean 'step'"),
        ({"loss_outputs": "all"}, "loss_outputs='all'"),
        ({"targets": ("keys",)}, "Did you mean 'key'"),
        ({"layers": (5,)}, "layers=.5. for a model of 2 blocks"),
        ({"ranks": ()}, r"got ranks=\[\]"),
        ({"ranks": (0.3, 24)}, "rank=24, which keeps 24 of the 24 directions"),
        ({"ranks": (0.01,)}, "rank=0.01, which keeps 0 of the 24"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        create("osf", pretrained("vit"), WIDTH, **options)


def test_layers_that_are_no_linear_ones_are_refused():
    with pytest.raises(ValueError, match="layers of nn.Linear"):
        create("osf", pretrained("gpt2"), WIDTH)
