"""What the results table compares: data sets, rows, and the candidates that each row's rate is chosen from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.registry import METHODS, takes_steps
from forgetcast.streams.sources import Source, digits
from forgetcast.streams.splits import split

PER_CLASS = 100
WIDE = 2000
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
CEILING_RATES, CEILING_DROPOUTS = (3e-4, 1e-3, 3e-3), (0.0, 0.5)
OPTIONS: dict[str, dict[str, Any]] = {name: {"capacity": 500} for name in ("replay", "der", "der++", "icarl")}

Choice = Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        label: what it is called.
        method: a name of the registry.
        options: of the method.
        placed: whether new rows of the head are fitted on frozen features before the rest trains.
        whole_head: whether the head has the outputs of all tasks from the start.
        ceiling: whether it is the joint upper bound: from scratch at every stage, to convergence, and with a hidden
            layer of `WIDE` units more.
        tuned_with: the label of the row whose choice it takes over; its own by default.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    placed: bool = False
    whole_head: bool = False
    ceiling: bool = False
    tuned_with: str | None = None

    def options_with(self, choice: Choice) -> dict[str, Any]:
        """The method's options at a chosen rate: SLCA has two of its own, which keep the ratio of their defaults."""
        if self.method != "slca":
            return dict(self.options)
        rate = choice["learning_rate"]
        return {**self.options, "head_rate": rate, "backbone_rate": rate / 100}


@dataclass(frozen=True)
class Setting:
    """A data set with its tasks, backbone and training.

    Attributes:
        name: short.
        title: above its table.
        source: with a test split of its own, so that nothing is chosen on it.
        increment: classes a task.
        backbone: makes a new one; and its width.
        optimization: of the gradient methods, at a rate to be chosen.
        ceiling: the same for the ceiling.
        standardise: whether the ceiling standardises its features first.
    """

    name: str
    title: str
    source: Source
    increment: int
    backbone: Callable[[], tuple[nn.Module, int]]
    optimization: Optimization
    ceiling: Optimization
    standardise: bool

    def optimization_of(self, row: Row, choice: Choice) -> Optimization:
        """How a row is trained."""
        base = self.ceiling if row.ceiling else self.optimization
        return replace(base, learning_rate=choice["learning_rate"]) if choice else base

    def candidates(self, row: Row) -> list[Choice]:
        """What a row chooses from; nothing for a closed form."""
        if row.ceiling:
            both = product(CEILING_RATES, CEILING_DROPOUTS)
            return [{"learning_rate": rate, "dropout": dropout} for rate, dropout in both]
        return [{"learning_rate": rate} for rate in RATES] if takes_steps(row.method, row.options) else [{}]

    def network(self, row: Row, choice: Choice) -> tuple[nn.Module, int]:
        """A new backbone for a row; and its width."""
        backbone, width = self.backbone()
        if not row.ceiling:
            return backbone, width
        first = [nn.BatchNorm1d(width, affine=False)] if self.standardise else []
        layers = (nn.Linear(width, WIDE), nn.ReLU(), nn.Dropout(choice["dropout"]))
        return nn.Sequential(backbone, *first, *layers), WIDE


def settings(folder: Path | None) -> list[Setting]:
    """Digits; and CIFAR-100 features where there is a folder."""
    pixels = digits()
    _, _, test = split(pixels, test_share=0.2, validation_share=0, seed=0)
    found = [
        Setting(
            "digits",
            "Digits: 5 tasks of 2 classes, 1,437 training and 360 test images, one hidden layer (128) that trains",
            replace(pixels, test=test),
            2,
            lambda: (nn.Sequential(nn.Linear(64, 128), nn.ReLU()), 128),
            Optimization(epochs=10, batch_size=32),
            Optimization(epochs=60, batch_size=64, schedule="cosine"),
            standardise=False,
        )
    ]
    if folder is not None:
        source = cifar_features(folder)
        width = source.inputs.shape[1]
        found.append(
            Setting(
                "cifar",
                f"CIFAR-100 through a frozen DeiT-Tiny: 10 tasks of 10 classes, {PER_CLASS} training and 100 test "
                "images a class",
                source,
                10,
                lambda: (nn.Identity(), width),
                Optimization(epochs=5, batch_size=64),
                Optimization(epochs=20, batch_size=64, schedule="cosine"),
                standardise=True,
            )
        )
    return found


def cifar_features(folder: Path) -> Source:
    """The first `PER_CLASS` training samples of each class and all test samples.

    Divided by one number, the standard deviation of the training features: what is stored are bytes.
    """
    archive = np.load(folder / "cifar100_deit_tiny_int8.npz")
    labels = archive["y_train"].astype(np.int64)
    kept = np.sort(np.concatenate([np.flatnonzero(labels == label)[:PER_CLASS] for label in np.unique(labels)]))
    inputs = np.concatenate([archive["f_train"][kept], archive["f_test"]]).astype(np.float32)
    inputs /= inputs[: len(kept)].std()
    answers = np.concatenate([labels[kept], archive["y_test"].astype(np.int64)])
    return Source("CIFAR-100 features", inputs, answers, np.arange(len(kept), len(inputs)))


def rows(setting: Setting) -> list[Row]:
    """Every method, every gradient method with placed rows too, and what the reading asks for."""
    plain = [Row(name, name, OPTIONS.get(name, {})) for name in METHODS]
    placed = [
        replace(row, label=f"{row.label}, placed rows", placed=True) for row in plain if setting.candidates(row) != [{}]
    ]
    session = {"first_session": True}
    sessions = [
        Row("simplecil, first session", "simplecil", session),
        Row("ranpac, first session", "ranpac", session, tuned_with="simplecil, first session"),
    ]
    trains = any(parameter.requires_grad for parameter in setting.backbone()[0].parameters())
    return [
        Row("joint, ceiling", "joint", ceiling=True),
        *plain,
        *placed,
        Row("der, all outputs from the start", "der", OPTIONS["der"], whole_head=True, tuned_with="der"),
        *(sessions if trains else []),
    ]
