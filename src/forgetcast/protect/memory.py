"""Which past samples are kept: a uniform sample of all seen, or the most typical of each class."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from forgetcast.checks import complaint, require_integer
from forgetcast.methods.base import Batch, Model, State, TaskData
from forgetcast.modes import evaluating
from forgetcast.protect.parameters import chosen_rows, padded


class Reservoir:
    """A uniform sample, of fixed size, of all samples added so far.

    The t-th sample takes the next free row, or, when none is free, row j ~ U{0..t-1} if j < capacity: after any t each
    sample so far is held with probability min(1, capacity / t).

    Args:
        capacity: samples held at most.
        seed: of the generator, which is part of the state.

    Attributes:
        seen: samples added so far.
        columns: what is held, by name, one row a sample.

    Source: Vitter 1985, algorithm R; Chaudhry et al., arXiv 1902.10486, algorithm 2.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        require_integer("capacity", capacity, least=1)
        self.capacity = capacity
        self.generator = torch.Generator().manual_seed(seed)
        self.seen = 0
        self.columns: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def add(self, columns: Mapping[str, Tensor]) -> None:
        """Offer samples, in order. Cost: O(n) plus one copy of the rows that enter.

        Args:
            columns: tensors (n, ...) of equal n; a column (n, C) may have grown since, old rows are then padded with 0.

        Raises:
            ValueError: other columns than before, or of unequal length.
        """
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1 or (self.columns and set(columns) != set(self.columns)):
            raise complaint(
                f"columns of lengths {lengths}",
                f"equal lengths, names {sorted(self.columns or columns)}",
                "Give every column one row a sample.",
            )
        source: dict[int, int] = {}
        for row in range(next(iter(lengths.values()))):
            place = self.seen
            self.seen += 1
            if place >= self.capacity:
                place = int(torch.randint(self.seen, (), generator=self.generator))
            if place < self.capacity:
                source[place] = row
        places, rows = list(source), list(source.values())
        for name, column in columns.items():
            held = self.columns.get(name)
            shape = (len(self), *column.shape[1:])
            if held is None:
                held = column.new_zeros(shape)
            elif held.shape != shape:
                held = padded(held, shape)
            held[places] = column.detach()[rows].to(held)
            self.columns[name] = held

    def remember(self, model: Model, task: TaskData) -> None:  # noqa: ARG002
        """Offer each training sample of the task once."""
        for batch in task.batches():
            self.add({"inputs": batch.inputs, "labels": batch.labels, "indices": batch.indices})

    def draw(self, count: int) -> dict[str, Tensor]:
        """Up to `count` different samples, uniformly."""
        return _drawn(self.columns, len(self), count, self.generator)

    def state_dict(self) -> State:
        """Samples, their number so far and the generator."""
        return {"seen": self.seen, "columns": dict(self.columns), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.seen = state["seen"]
        # rows are replaced in place
        self.columns = {name: column.clone() for name, column in state["columns"].items()}
        self.generator.set_state(state["generator"].cpu())


class Exemplars:
    """Equally many samples of each class, those whose mean feature stays nearest to the class mean.

    Args:
        capacity: samples held at most; each of the t classes seen has capacity // t, at least 1.
        seed: of the generator for draws, which is part of the state.

    Attributes:
        classes: columns of each class, in herding order: to hold fewer, the last are dropped.

    Cost: at `remember` two passes over the task and its features in memory.

    Source: iCaRL, arXiv 1611.07725, algorithms 4 and 5.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        require_integer("capacity", capacity, least=1)
        self.capacity = capacity
        self.generator = torch.Generator().manual_seed(seed)
        self.classes: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return sum(len(columns["labels"]) for columns in self.classes.values())

    def remember(self, model: Model, task: TaskData) -> None:
        """Make room, then herd the classes of the task."""
        share = max(self.capacity // len(task.seen), 1)
        for label, columns in self.classes.items():
            self.classes[label] = {name: column[:share].clone() for name, column in columns.items()}
        features, labels = task_features(model, task)
        for label in sorted(set(labels.tolist())):
            rows = (labels == label).nonzero()[:, 0]
            self.classes[label] = _gathered(task, rows[herding(normalize(features[rows]), share)])

    def draw(self, count: int) -> dict[str, Tensor]:
        """Up to `count` different samples, uniformly."""
        names = next(iter(self.classes.values()), {})
        columns = {name: torch.cat([held[name] for held in self.classes.values()]) for name in names}
        return _drawn(columns, len(self), count, self.generator)

    def state_dict(self) -> State:
        """Samples by class, and the generator."""
        return {
            "classes": {str(label): dict(columns) for label, columns in self.classes.items()},
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.classes = {int(label): dict(columns) for label, columns in state["classes"].items()}
        self.generator.set_state(state["generator"].cpu())


def herding(features: Float[Tensor, "n d"], count: int) -> Int[Tensor, " m"]:
    r"""Rows, in the order in which they best keep the mean.

        p_k = argmin_x || mu - (phi(x) + sum_{j<k} phi(p_j)) / k ||,      each row once

    Args:
        features: phi; scale rows to length 1 to follow iCaRL.
        count: how many; more than there are means all.

    Returns:
        (min(count, n),) rows.

    Cost: O(count n d).

    Source: arXiv 1611.07725, algorithm 4.
    """
    mean = features.mean(0)
    squares = features.square().sum(1)
    total = torch.zeros_like(mean)
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    order = []
    for k in range(1, min(count, len(features)) + 1):
        # ||k mu - total - phi||^2 less its part that all rows share
        distance = squares - 2 * features @ (k * mean - total)
        row = int(distance.masked_fill(~free, torch.inf).argmin())
        free[row] = False
        total = total + features[row]
        order.append(row)
    return torch.tensor(order, dtype=torch.int64, device=features.device)


def batch_of(columns: Mapping[str, Tensor], like: Batch) -> Batch:
    """Drawn columns as a batch, where `like` is."""
    device = like.labels.device
    return Batch(columns["inputs"].to(device), columns["labels"].to(device), columns["indices"].to(device))


def task_features(model: Model, task: TaskData) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
    """Features and labels of a task's training samples, in evaluation mode.

    Raises:
        ValueError: a task without batches.
    """
    with torch.no_grad(), evaluating(model):
        parts = [(model.features(batch.inputs), batch.labels) for batch in task.batches()]
    if not parts:
        raise complaint("a task without batches", "at least one", "Let `TaskData.batches` read the task.")
    return torch.cat([phi for phi, _ in parts]), torch.cat([labels for _, labels in parts])


def _gathered(task: TaskData, rows: Tensor) -> dict[str, Tensor]:
    """The samples of these rows of the task, in the order of `rows`."""
    wanted: Sequence[int] = rows.tolist()
    found: dict[int, dict[str, Tensor]] = {}
    first = 0
    for batch in task.batches():
        for row in wanted:
            i = row - first
            if 0 <= i < len(batch.labels):
                columns = {"inputs": batch.inputs, "labels": batch.labels, "indices": batch.indices}
                found[row] = {name: column[i].clone() for name, column in columns.items()}
        first += len(batch.labels)
    return {name: torch.stack([found[row][name] for row in wanted]) for name in ("inputs", "labels", "indices")}


def _drawn(columns: Mapping[str, Tensor], length: int, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    require_integer("count", count, least=1)
    if length == 0:
        raise complaint("a draw from an empty memory", "at least one sample held", "Let a task end first.")
    rows = chosen_rows(length, count, generator)
    return {name: column[rows.to(column.device)] for name, column in columns.items()}
