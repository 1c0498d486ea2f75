"""One run of the table of gradient projection: a tuner, with or without it, at one seed."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.projection_settings import SETTINGS, Cached, Setting, UpperImage, pretrained_image, stream_of
from forgetcast.heads.linear import Linear
from forgetcast.heads.prototype import Prototype
from forgetcast.learn.loop import learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.learn.seeding import seed_everything
from forgetcast.methods.base import Method, Model, Protection, TaskData
from forgetcast.methods.ncm import NCM
from forgetcast.methods.probe import Probe
from forgetcast.methods.sequential import Sequential
from forgetcast.metrics.matrix import all_metrics
from forgetcast.modes import evaluating
from forgetcast.protect.parameters import trainable
from forgetcast.protect.projected import GradientProjection
from forgetcast.streams.stream import Stream
from forgetcast.tuners.adapter import Adapter
from forgetcast.tuners.lora import LoRA
from forgetcast.tuners.prefix import Prefix
from forgetcast.tuners.prompt import Prompt

Table = dict[str, Any]
TUNERS: dict[str, Any] = {
    "adapter": Adapter(rank=8),
    "lora": LoRA(rank=4, targets=("query", "value")),
    "prefix": Prefix(length=10),
    "prompt": Prompt(length=10),
}
Learner = Literal["every task", "first task", "head", "means"]


@dataclass(frozen=True)
class Run:
    """What is measured.

    Attributes:
        setting: a name of `SETTINGS`.
        tuner: a name of `TUNERS`; None where nothing but a head learns.
        learner: in which tasks the tuner trains, or that nothing but a linear head or class means learn.
        projection: options of `GradientProjection`; None without it.
        rate: learning rate of the tuner.
        head_rate: of the linear head.
        seed: of task order, tuner, and order of samples.
        tasks: how many of them.
        validation: whether to measure on samples set aside from training, by which the rate is chosen.
    """

    setting: str
    tuner: str | None
    learner: Learner = "every task"
    projection: Mapping[str, Any] | None = None
    rate: float = 1e-3
    head_rate: float = 1e-3
    seed: int = 0
    tasks: int = 10
    validation: bool = False

    @property
    def row(self) -> str:
        """What it is called, seed and rate aside."""
        return row_of(self.setting, self.tuner, self.learner, self.projection)

    @property
    def key(self) -> str:
        """Its place in the JSON. A chosen rate is no part of it: there is one run of a row at a seed."""
        return f"{self.row} / seed {self.seed}" + (f" / rate {self.chosen_rate:g}" if self.validation else "")

    @property
    def chosen_rate(self) -> float:
        """The rate that is chosen for it: that of the tuner, or of the head where there is none."""
        return self.head_rate if self.tuner is None else self.rate

    def optimization(self) -> Optimization:
        """How it is trained."""
        return replace(SETTINGS[self.setting].optimization, learning_rate=self.chosen_rate)

    def identity(self, data: str) -> Table:
        """All that decides its numbers, but for the code."""
        tuner = None if self.tuner is None else repr(TUNERS[self.tuner])
        return {**asdict(self), "tuner": tuner, "optimization": asdict(self.optimization()), "data": data}


def row_of(
    setting: str, tuner: str | None, learner: Learner = "every task", projection: Mapping[str, Any] | None = None
) -> str:
    """What a row is called."""
    parts = [setting, tuner or "frozen", learner]
    if projection is not None:
        parts.append(", ".join(["projected", *(f"{key} {value}" for key, value in projection.items())]))
    return " / ".join(parts)


class TwoRates(Sequential):
    """Fine-tuning in which the head has a rate of its own. The loss runs over the task's own classes."""

    def __init__(self, model: Model, protections: Sequence[Protection], head_rate: float) -> None:
        super().__init__(model, protections, loss_outputs="task")
        self.head_rate = head_rate

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Tuner and head."""
        tuner, head = (list(trainable(part).values()) for part in (self.model.backbone, self.model.head))
        return [{"params": tuner}, {"params": head, "lr": self.head_rate}]


class FrozenAfterFirst(Protection):
    """Nothing of the backbone trains once the first task is learnt."""

    def end_task(self, model: Model, task: TaskData) -> None:  # noqa: ARG002 - the contract of protections
        """Freeze."""
        model.backbone.requires_grad_(False)


class Features:
    """What becomes of features: class means kept from each class's own task, and the drift of the first task's."""

    def __init__(self, method: Method, stream: Stream, width: int) -> None:
        self.method, self.stream = method, stream
        self.head = Prototype(width)
        self.head.grow(int(stream.outputs.max()) + 1)
        self.start: torch.Tensor | None = None
        self.drift: list[float] = []
        self.matrix: list[list[float]] = []

    def __call__(self, event: Mapping[str, Any]) -> None:
        """After each task: means of its classes, accuracy of the tasks so far, ||phi - phi_1|| / ||phi_1||."""
        if event["event"] != "task":
            return
        index = len(self.matrix)
        outputs = torch.from_numpy(self.stream.outputs)
        own = self.stream[index].train
        self.head.observe(self.features(own), outputs[own])
        self.head.solve()
        row = []
        for task in self.stream.tasks[: index + 1]:
            found = self.features(task.test)
            if task is self.stream[0]:
                self.start = found if self.start is None else self.start
                self.drift.append(float((found - self.start).norm() / self.start.norm()))
            scores = self.head(found)
            scores[:, self.head.counts == 0] = -torch.inf
            row.append(float((scores.argmax(1) == outputs[task.test]).double().mean()))
        self.matrix.append(row)

    def features(self, places: Any) -> torch.Tensor:
        """Of some samples, by the model as it is."""
        inputs = torch.from_numpy(self.stream.source.inputs[places])
        with torch.no_grad(), evaluating(self.method.model):
            return torch.cat([self.method.model.features(some) for some in inputs.split(100)])


def measured(run: Run, cached: Cached, folder: Path) -> Table:
    """All that the page tells of a run."""
    started = process_time()
    stream = stream_of(cached, run.setting, run.seed, validation=run.validation)
    seed_everything(run.seed)
    setting = SETTINGS[run.setting]
    method = method_of(run, setting, folder)
    features = Features(method, stream, setting.width)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* of their directions free")  # the page tells how many
        done = learn(method, stream, run.optimization(), seed=run.seed, on_event=features, until=run.tasks)
    return {
        "metrics": all_metrics(done.accuracy_matrix),
        "told": all_metrics(done.task_incremental_matrix),
        "accuracy_matrix": done.accuracy_matrix,
        "newest_told": fmean(row[-1] for row in done.task_incremental_matrix),
        "means": all_metrics(features.matrix),
        "means_matrix": features.matrix,
        "drift": features.drift,
        "trainable_parameters": done.trainable_parameters[0],
        "seconds": sum(done.seconds),
        "cpu_seconds": process_time() - started,
        **free_directions(method),
    }


def method_of(run: Run, setting: Setting, folder: Path) -> Method:
    """The method, untrained. Losses run over the task's own classes, so that rows of old ones have no gradient."""
    backbone = setting.upper(folder).requires_grad_(False)
    if run.tuner is not None:
        TUNERS[run.tuner].attach(backbone)
    if run.learner == "means":
        return NCM(backbone, setting.width)
    model = Model(backbone, Linear(setting.width))
    if run.learner == "head":
        return Probe(model, loss_outputs="task")
    protections: list[Protection] = [FrozenAfterFirst()] if run.learner == "first task" else []
    if run.projection is not None:
        protections.append(GradientProjection(mask=setting.mask, **run.projection))
    return TwoRates(model, protections, run.head_rate)


def free_directions(method: Method) -> Table:
    """Of every space of a projection the directions that its fullest block has left, after the last task."""
    found = [protection for protection in method.protections if isinstance(protection, GradientProjection)]
    if not found:
        return {}
    table = found[0].table(method.model)
    return {name: table[name].tolist() for name in ("space", "width", "free")}


def cost_of_clip(cached: Cached, folder: Path) -> Table:
    """Nearest-class-mean accuracy of the image model with its tuned blocks as trained, and without their clip."""
    last = len(cached.labels) - len(cached.test)

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            features = torch.cat([model(some) for some in cached.states.split(200)])
        head = Prototype(features.shape[1], metric="euclidean")
        head.grow(int(cached.labels.max()) + 1)
        head.observe(features[:last], cached.labels[:last])
        head.solve()
        return float((head(features[last:]).argmax(1) == cached.labels[last:]).double().mean())

    blocks, norm = pretrained_image(folder)
    return {"as trained": accuracy(UpperImage(blocks, norm)), "without": accuracy(SETTINGS["vit"].upper(folder))}
