"""Streams and the network of the table of update magnitudes, as near to arXiv 2602.20796 as its text allows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

from benchmarks.forecast_settings import shared
from forgetcast.streams.sources import Source
from forgetcast.streams.stream import Stream, Task

TASKS = 5
WIDTH = 128


class Residual(nn.Module):
    """Two convolutions and what goes past them."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        stride = 1 if inside == outside else 2
        self.first = nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside))
        self.second = nn.Sequential(nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside))
        self.past = nn.Identity()
        if stride > 1:
            self.past = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.past(x))


class NineBlocks(nn.Module):
    """A convolution, eight residual blocks, the mean over places.

    Args:
        channels: of the images.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (16, 16, 16, 32, 32, 64, 64, WIDTH, WIDTH)
        first = nn.Sequential(nn.Conv2d(channels, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.blocks = nn.Sequential(first, *(Residual(inside, outside) for inside, outside in pairwise(widths)))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.blocks(images).mean((2, 3))
        return found


@dataclass(frozen=True, eq=False)
class Samples:
    """Images (n, channels, h, w) in 0 .. 1, their labels, and which are for testing."""

    images: Tensor
    labels: np.ndarray
    test: np.ndarray


def cifar(folder: Path, name: str, train: int, test: int) -> Samples:
    """The first images of each class."""
    read = getattr(shared(folder), name)
    kept, answers = [], []
    for part, each in (("train", train), ("test", test)):
        images, labels = read(part)
        places = np.concatenate([np.flatnonzero(labels == label)[:each] for label in np.unique(labels)])
        kept.append(images[places])
        answers.append(labels[places])
    images = torch.from_numpy(np.concatenate(kept)).permute(0, 3, 1, 2).float() / 255
    return Samples(images, np.concatenate(answers), np.arange(sum(map(len, kept))) >= len(answers[0]))


def mnist(folder: Path, train: int, test: int) -> Samples:
    """The first images of each digit."""
    read = shared(folder).mnist()
    kept, answers = [], []
    for part, each in (("train", train), ("test", test)):
        labels = read[f"y_{part}"]
        places = np.concatenate([np.flatnonzero(labels == label)[:each] for label in range(10)])
        kept.append(read[f"x_{part}"][places])
        answers.append(labels[places])
    images = torch.from_numpy(np.concatenate(kept))[:, None].float() / 255
    return Samples(images, np.concatenate(answers), np.arange(len(images)) >= len(answers[0]))


def split(samples: Samples, name: str, seed: int) -> Stream:
    """Tasks of new classes each."""
    classes = np.random.default_rng(seed).permutation(np.unique(samples.labels))
    return _stream(samples, name, classes, np.array_split(classes, TASKS), seed)


def correlated(samples: Samples, name: str, seed: int) -> Stream:
    """Tasks that share half of their classes with the one before, each with samples of its own."""
    drawn = np.random.default_rng(seed)
    classes = drawn.permutation(np.unique(samples.labels))
    size = len(classes) // TASKS
    groups = [classes[k * size // 2 :][:size] for k in range(TASKS)]
    return _stream(samples, name, classes, groups, seed)


def corrupted(samples: Samples, name: str, seed: int) -> Stream:
    """New classes each, and after the first task a damage of its own: noise, blur, little contrast, wrong pixels."""
    stream = split(samples, name, seed)
    images = samples.images.clone()
    noise = torch.Generator().manual_seed(seed)
    for task, damage in zip(stream.tasks[1:], DAMAGES, strict=True):
        places = torch.from_numpy(np.concatenate([task.train, task.test, task.validation]))
        images[places] = damage(images[places], noise)
    return _replaced(stream, images)


def permuted(samples: Samples, name: str, seed: int) -> Stream:
    """The same digits in every task, with outputs, samples and, after the first, an order of pixels of its own."""
    drawn = np.random.default_rng(seed)
    turns = np.empty_like(samples.labels)
    for label, side in product(np.unique(samples.labels), (False, True)):
        places = np.flatnonzero((samples.labels == label) & (samples.test == side))
        turns[drawn.permutation(places)] = np.arange(len(places)) % TASKS
    digits = len(np.unique(samples.labels))
    flat = samples.images.flatten(2).clone()
    for task in range(1, TASKS):
        places = torch.from_numpy(np.flatnonzero(turns == task))
        flat[places] = flat[places][:, :, torch.from_numpy(drawn.permutation(flat.shape[2]))]
    labels = samples.labels + digits * turns
    several = Samples(flat.view_as(samples.images), labels, samples.test)
    return _stream(several, name, np.arange(TASKS * digits), np.split(np.arange(TASKS * digits), TASKS), seed)


def _noisy(images: Tensor, noise: torch.Generator) -> Tensor:
    return (images + 0.2 * torch.randn(images.shape, generator=noise)).clamp(0, 1)


def _blurred(images: Tensor, _: torch.Generator) -> Tensor:
    return avg_pool2d(pad(images, (2, 2, 2, 2), mode="reflect"), 5, 1)


def _faded(images: Tensor, _: torch.Generator) -> Tensor:
    return 0.3 * images + 0.35


def _spotted(images: Tensor, noise: torch.Generator) -> Tensor:
    spots = torch.rand((len(images), 1, *images.shape[2:]), generator=noise)
    return torch.where(spots < 0.2, (spots < 0.1).float(), images)


DAMAGES: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (_noisy, _blurred, _faded, _spotted)


def _stream(samples: Samples, name: str, classes: np.ndarray, groups: Sequence[np.ndarray], seed: int) -> Stream:
    """Tasks of the given classes; samples of a class that several tasks have are dealt out to them."""
    order = np.random.default_rng([seed, 1])
    tasks = []
    place = {int(label): output for output, label in enumerate(classes)}
    owners = {int(label): [k for k, group in enumerate(groups) if label in group] for label in classes}
    shared = max(map(len, owners.values()))
    parts: list[list[list[int]]] = [[[], []] for _ in groups]
    for label, having in owners.items():
        for side in (0, 1):
            own = order.permutation(np.flatnonzero((samples.labels == label) & (samples.test == side)))
            for task, some in zip(having, np.array_split(own, max(len(having), shared)), strict=False):
                parts[task][side] += some.tolist()
    for group, (train, test) in zip(groups, parts, strict=True):
        outputs = tuple(sorted(place[int(label)] for label in group))
        tasks.append(Task(outputs, np.sort(np.array(train)), np.sort(np.array(test))))
    outputs = np.array([place[int(label)] for label in samples.labels])
    source = Source(name, _normal(samples.images).numpy(), samples.labels, np.flatnonzero(samples.test))
    return Stream(
        source,
        tuple(tasks),
        tuple(int(label) for label in classes),
        outputs,
        seed,
        "task-incremental",
        {"stream": name},
        task_incremental=True,
    )


def _normal(images: Tensor) -> Tensor:
    return (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)


def _replaced(stream: Stream, images: Tensor) -> Stream:
    source = replace(stream.source, inputs=_normal(images).numpy())
    return replace(stream, source=source)


@dataclass(frozen=True)
class Setting:
    """A stream.

    Attributes:
        title: in tables.
        made: from the folder of the shared data sets and a seed.
        channels: of its images.
    """

    title: str
    made: Callable[[Path, int], Stream]
    channels: int = 3


SETTINGS = {
    "cifar10": Setting(
        "split CIFAR-10", lambda folder, seed: split(cifar(folder, "cifar10", 500, 200), "cifar10", seed)
    ),
    "cifar100": Setting(
        "split CIFAR-100", lambda folder, seed: split(cifar(folder, "cifar100", 120, 50), "cifar100", seed)
    ),
    "correlated": Setting(
        "correlated CIFAR-100", lambda folder, seed: correlated(cifar(folder, "cifar100", 240, 100), "correlated", seed)
    ),
    "corrupted": Setting(
        "corrupted CIFAR-100", lambda folder, seed: corrupted(cifar(folder, "cifar100", 120, 50), "corrupted", seed)
    ),
    "permuted": Setting(
        "permuted MNIST", lambda folder, seed: permuted(mnist(folder, 500, 250), "permuted", seed), channels=1
    ),
}
