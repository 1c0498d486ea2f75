"""Gradient projection inside the learning loop: old answers stay, runs resume, states of other options are refused."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from forgetcast.backbones.huggingface import Pooled
from forgetcast.heads.cosine import Cosine
from forgetcast.heads.linear import Linear
from forgetcast.learn.checkpoint import Checkpointing
from forgetcast.learn.loop import learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.base import Batch, Method, Model, TaskData
from forgetcast.methods.pegp import PEGP
from forgetcast.methods.sequential import Sequential
from forgetcast.protect.placement import Placement
from forgetcast.protect.projected import GradientProjection, StandingRows
from forgetcast.streams.domains import domain_incremental
from forgetcast.streams.scenarios import Stream, class_incremental
from forgetcast.streams.sources import Source
from forgetcast.tuners.adapter import Adapter
from forgetcast.tuners.anatomy import Anatomy, Block
from forgetcast.tuners.sites import sites_of

WIDTH = 24
PARTS = Anatomy(tuple(Block(f"{k}.part", f"{k}.part.0", f"{k}.part.2") for k in range(2)))
OPTIMIZATIONS = {
    "sgd": Optimization("sgd", 0.02, epochs=20, batch_size=4, momentum=0.9, weight_decay=1e-2),
    "adamw": Optimization("adamw", 0.01, epochs=20, batch_size=4, weight_decay=0.1, max_gradient_norm=1.0),
}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(WIDTH, 30), nn.GELU(), nn.Linear(30, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.part(x)


def tuned_model(head=Linear) -> Model:
    torch.manual_seed(0)
    backbone = nn.Sequential(Residual(), Residual())
    tuned = Adapter(rank=20, bias=True).attach(backbone, PARTS)
    for parameter in tuned.parameters():
        nn.init.normal_(parameter, std=0.1)
    return Model(backbone, head(WIDTH))


def source(seed: int) -> Source:
    """Three samples a class to learn from, one to test."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(24) % 6
    inputs = torch.randn(24, WIDTH, generator=draw) + torch.randn(6, WIDTH, generator=draw)[labels]
    return Source(f"source {seed}", inputs.numpy(), labels.numpy())


@cache
def stream() -> Stream:
    return class_incremental(source(4), 2, seed=0, test_share=0.25)


def first_task(tasks: Stream) -> Tensor:
    return torch.from_numpy(tasks.source.inputs[tasks[0].train])


def outputs(model: Model, inputs: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model.features(inputs), model(inputs)


def relative(now: Tensor, before: Tensor) -> float:
    return float((now - before).detach().norm() / before.detach().norm())


def moved(method: Method, optimization: Optimization, tasks: Stream | None = None) -> dict[str, float]:
    """How far features and logits of the first task's samples, over its classes, move in the tasks after it."""
    tasks = tasks or stream()
    model, inputs, held = method.model, first_task(tasks), {}

    def remember(event) -> None:
        if event["event"] == "task" and event["task"] == 0:
            held["features"], held["logits"] = outputs(model, inputs)
            held["state"] = {name: value.detach().clone() for name, value in model.named_parameters()}

    learn(method, tasks, optimization, on_event=remember)
    features, logits = outputs(model, inputs)
    old = held["logits"].shape[1]
    now = dict(model.named_parameters())
    way = {name: value[: len(held["state"][name])] if value.ndim else value for name, value in now.items()}
    return {
        "features": relative(features, held["features"]),
        "logits": relative(logits[:, :old], held["logits"]),
        "rows": max(relative(way[name], held["state"][name]) for name in way if name.startswith("head")),
        "tuner": max(relative(way[name], held["state"][name]) for name in way if ".adapter." in name),
    }


@cache
def unprotected(optimizer: str) -> float:
    plain = moved(Sequential(tuned_model()), OPTIMIZATIONS[optimizer])
    return min(plain["features"], plain["logits"])


@pytest.mark.parametrize("optimizer", OPTIMIZATIONS)
@pytest.mark.parametrize("head", ["rows", "projected", "free"])
def test_old_logits_stay_as_the_head_promises(optimizer, head):
    """To 1e-5 over 80 steps in single precision; a free head moves them, and without projection all moves."""
    far = moved(PEGP(tuned_model(), threshold=1.0, head=head), OPTIMIZATIONS[optimizer])
    assert far["features"] < 1e-5
    assert far["tuner"] > 1e-3
    assert (far["logits"] < 1e-5) == (head != "free")
    assert (far["rows"] == 0) == (head == "rows")
    assert unprotected(optimizer) > 1e-2


def test_placed_rows_and_projection_go_together():
    method = PEGP(tuned_model(), threshold=1.0)
    method.protections = (Placement(), *method.protections)
    far = moved(method, OPTIMIZATIONS["adamw"])
    assert far["logits"] < 1e-5
    assert far["rows"] == 0
    assert all(float(row.detach().norm()) > 0.1 for row in method.model.head.weight)


def test_what_all_outputs_of_a_head_share_stands_still_too():
    far = moved(PEGP(tuned_model(Cosine), threshold=1.0), OPTIMIZATIONS["adamw"])
    assert far["logits"] < 1e-5
    assert far["rows"] == 0
    with pytest.raises(ValueError, match="a Cosine head to be projected; expected a linear one"):
        moved(PEGP(tuned_model(Cosine), head="projected"), OPTIMIZATIONS["adamw"])


def test_projected_rows_move_on_where_classes_come_again_and_standing_ones_do_not():
    tasks = domain_incremental([source(4), source(5)], seed=0, test_share=0.25)
    for head, moves in (("rows", False), ("projected", True)):
        far = moved(PEGP(tuned_model(), threshold=0.7, head=head), OPTIMIZATIONS["sgd"], tasks)
        assert (far["rows"] > 1e-3) == moves


def test_projected_gradients_are_there_by_name_and_let_adam_leave():
    far = moved(PEGP(tuned_model(), threshold=1.0, target="gradient"), OPTIMIZATIONS["adamw"])
    assert far["features"] > 1e-3
    plain = Optimization("sgd", 0.02, epochs=10, batch_size=4, max_gradient_norm=0.1)
    assert moved(PEGP(tuned_model(), threshold=1.0, target="gradient"), plain)["features"] < 1e-5


def test_strength_slows():
    """Each step of a plain descent keeps the share 1 - rho of what it has along old directions."""
    steps = {}
    for strength in (0.0, 0.6, 1.0):
        model = tuned_model().double()
        method = Sequential(model, [GradientProjection(1.0, strength=strength)])
        inputs = first_task(stream()).double()
        labels = torch.arange(len(inputs)) % 2
        batch = Batch(inputs, labels, labels)
        task = TaskData(0, (0, 1), (0, 1), lambda batch=batch: iter([batch]))
        method.begin_task(task)
        method.end_task(task)
        method.begin_task(task)
        optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.1)
        nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
        (site, *_) = sites_of(model)
        before = site.matrix([parameter.detach() for parameter in site.parameters]).clone()
        method.loss(batch).backward()
        method.after_backward()
        optimizer.step()
        method.after_step()
        old = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
        steps[strength] = (site.matrix([parameter.detach() for parameter in site.parameters]) - before) @ old.T
    assert float(steps[0.0].norm()) > 1e-6
    torch.testing.assert_close(steps[0.6], 0.4 * steps[0.0])
    assert float(steps[1.0].norm()) < 1e-12 * float(steps[0.0].norm()) + 1e-15


@pytest.mark.parametrize("options", [{}, {"head": "projected", "threshold": 0.9, "energy": "sigma4", "strength": 0.8}])
@pytest.mark.parametrize("stop", [(1, 2), (1, None)], ids=["within a task", "at its end"])
def test_a_resumed_run_is_the_whole_run(tmp_path, options, stop):
    optimization = replace(OPTIMIZATIONS["adamw"], epochs=4)

    def new() -> PEGP:
        return PEGP(tuned_model(), **options)

    whole = new()
    matrix = learn(whole, stream(), optimization, seed=3).accuracy_matrix

    def interrupt(event) -> None:
        if (event["task"], event.get("epoch")) == stop:
            raise KeyboardInterrupt

    checkpointing = Checkpointing(tmp_path, steps=3)
    with pytest.raises(KeyboardInterrupt):
        learn(new(), stream(), optimization, seed=3, checkpointing=checkpointing, on_event=interrupt)
    resumed = new()
    assert learn(resumed, stream(), optimization, seed=3, checkpointing=checkpointing).accuracy_matrix == matrix
    mine, its = (method.state_dict()["protections"]["0"]["bases"] for method in (whole, resumed))
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in mine)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize(
    "other",
    [
        {"threshold": 0.9},
        {"strength": 0.5},
        {"energy": "sigma4"},
        {"conditions": "paper"},
        {"target": "gradient"},
        {"head": True},
    ],
)
def test_states_of_other_options_are_refused(other):
    state = GradientProjection().state_dict()
    GradientProjection().load_state_dict(state)
    (name,) = other
    with pytest.raises(ValueError, match=f"a state saved with {name}=.* for a projection with {name}="):
        GradientProjection(**other).load_state_dict(state)


def test_models_that_it_cannot_protect_are_refused():
    task = TaskData(0, (0, 1), (0, 1), lambda: iter([]))
    bare = Model(nn.Sequential(Residual()), Linear(WIDTH, 2))
    with pytest.raises(ValueError, match="no tuner in Model"):
        PEGP(bare).begin_task(task)
    model = tuned_model()
    model.backbone[0].part[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"a backbone of which \['0.part.0.bias'\] trains beside the tuner"):
        PEGP(model).begin_task(task)


def test_directions_held_and_free_are_told():
    method = PEGP(tuned_model(), threshold=1.0, head="projected")
    learn(method, stream(), OPTIMIZATIONS["sgd"], until=2)
    table = method.protections[0].table(method.model).set_index("space")
    assert len(table) == 5
    assert (table["rank"] == 12).all()
    assert (table["free"] == table["width"] - 12).all()


class Words(nn.Module):
    """What stands behind `Pooled`: word vectors and blocks that look at one token each."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, WIDTH)
        self.blocks = nn.Sequential(Residual(), Residual())
        self.config = SimpleNamespace(hidden_size=WIDTH, to_dict=dict)

    def forward(self, input_ids: Tensor, attention_mask: Tensor):
        assert attention_mask.shape == input_ids.shape
        return SimpleNamespace(last_hidden_state=self.blocks(self.words(input_ids)))


def test_padding_of_texts_takes_no_directions():
    """The bases of padded texts are those of the same texts one by one."""
    torch.manual_seed(0)
    words = Words().requires_grad_(False)
    Adapter(rank=20).attach(words.blocks, PARTS)
    model = Model(Pooled(words, "mean"), Linear(WIDTH))
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 50, (3, 6), generator=draw)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    texts = torch.stack([tokens * mask, mask], 1)  # the padding token is 0

    def ranks(*batches: Tensor) -> dict[str, Tensor]:
        rows = torch.zeros(1, dtype=torch.int64)
        protection = GradientProjection(1.0)
        parts = [Batch(batch, rows.expand(len(batch)), rows.expand(len(batch))) for batch in batches]
        task = TaskData(0, (0,), (0,), lambda: iter(parts))
        protection.begin_task(model, task)
        protection.end_task(model, task)
        return protection.bases

    together, alone = ranks(texts), ranks(*(text[None] for text in texts))
    for name, basis in together.items():
        other = alone[name]
        assert basis.shape == other.shape
        torch.testing.assert_close(basis @ basis.T, other @ other.T, atol=1e-5, rtol=0)
    assert together["backbone.model.blocks.0.part.2.adapter.down/0"].shape[1] == 7


def test_standing_rows_are_of_outputs_seen_before():
    rows = StandingRows()
    model = Model(nn.Identity(), Linear(4, 3))
    task = TaskData(0, (0, 2), (0, 2), lambda: iter([]))
    rows.end_task(model, task)
    again = StandingRows()
    again.load_state_dict(rows.state_dict())
    again.after_backward(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    again.after_step(model)
    assert model.head.bias.tolist() == [0, 1, 0]
    assert model.head.weight.sum(1).tolist() == [0, 4, 0]


@pytest.mark.parametrize("head", ["rows", "projected", "free"])
def test_restraints_are_what_is_left_of_any_step(head):
    """One after the other, as a forecast takes them; they change neither what they are given nor the model."""
    method = PEGP(tuned_model().double(), threshold=0.8, head=head)
    model, inputs = method.model, first_task(stream()).double()
    for index, classes in enumerate([(0, 1), (2, 3)]):
        batch = Batch(inputs, torch.arange(12) % 2, torch.arange(12))
        task = TaskData(index, classes, tuple(range(classes[-1] + 1)), lambda batch=batch: iter([batch]))
        method.begin_task(task)
        if index == 0:
            method.end_task(task)
    values = {name: value.data for name, value in model.named_parameters() if value.requires_grad}
    draw = torch.Generator().manual_seed(0)
    before = {name: value.clone() for name, value in values.items()}
    step = {name: 0.1 * torch.randn(value.shape, generator=draw, dtype=torch.float64) for name, value in values.items()}
    taken = dict(step)
    for restraint in filter(None, [protection.restraint(model) for protection in method.protections]):
        given = {name: value.clone() for name, value in taken.items()}
        passed = dict(restraint(before, taken))
        assert all(torch.equal(value, taken[name]) for name, value in given.items())
        taken = passed
    assert all(torch.equal(value, before[name]) for name, value in values.items())
    method.after_backward()
    for name, value in values.items():
        value.add_(step[name])
    method.after_step()
    for name, value in values.items():
        torch.testing.assert_close(value - before[name], taken[name])
        assert torch.equal(taken[name], step[name]) == (head == "free" and name.startswith("head"))


def test_projected_gradients_have_no_restraint_of_steps():
    model = tuned_model()
    assert GradientProjection().restraint(model) is not None
    assert GradientProjection(target="gradient").restraint(model) is None
