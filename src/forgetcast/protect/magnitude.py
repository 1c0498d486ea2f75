"""How many modules of a backbone train on each task after the first."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from forgetcast.checks import complaint, require_choice, require_integer, require_number
from forgetcast.forecast.network.modules import Modules, modules_of
from forgetcast.methods.base import Model, Protection, State, TaskData
from forgetcast.protect.decision import Decision, decisions_from, modules_from, plain, train_only
from forgetcast.protect.parameters import trainable
from forgetcast.protect.similarity import (
    METRICS,
    Labelled,
    Metric,
    Rows,
    cosines,
    drawn,
    fitted_rows,
    point_of,
    probe_error,
    standing_at,
)
from forgetcast.protect.similarity import task_gradient as gradient_of

Order = Literal["last", "cosine"]
ORDERS: tuple[Order, ...] = ("last", "cosine")
FittedTo = Literal["own", "joint"]
FITTED_TO: tuple[FittedTo, ...] = ("own", "joint")
DIGITS = 6
"""Of cosines that count as equal."""


class LastModules(Protection):
    """Frozen training: after the first task only the last modules and the head train.

    Normalisations whose parameters stand still keep their statistics (`training_mode`).

    Args:
        specific: how many of the last modules train on; 0 leaves the head.
        modules: patterns of parameter names, one a module; by default the blocks of the stack (`modules_of`).

    Source: arXiv 2602.20796, which calls the part that trains task-specific and does not say which it is.
    """

    def __init__(self, specific: int = 0, *, modules: Sequence[str] | None = None) -> None:
        require_integer("specific", specific)
        self.specific = specific
        self.patterns = modules
        self.modules: Modules = {}
        self.decisions: list[Decision] = []

    def begin_task(self, model: Model, task: TaskData) -> None:
        """Choose what trains.

        Raises:
            ValueError: a backbone of which nothing trains, or with fewer modules than are to train on.
        """
        self.modules = self.modules or modules_of(trainable(model.backbone), self.patterns)
        names = list(self.modules)
        if self.specific > len(names):
            raise complaint(
                f"specific={self.specific} of {len(names)} modules", f"at most {len(names)}", f"They are {names}."
            )
        chosen = names if task.index == 0 else names[len(names) - self.specific :]
        reason = "it is the first" if task.index == 0 else f"the last {self.specific} are task-specific"
        train_only(model, self.modules, chosen)
        self.decisions.append(Decision(task.index, tuple(chosen), len(names), reason))

    def decided(self) -> list[dict[str, Any]]:
        """What trained in each task so far."""
        return [decision.told() for decision in self.decisions]

    def state_dict(self) -> State:
        """Modules and decisions."""
        return {"modules": plain(self.modules), "decisions": self.decided()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.modules = modules_from(state["modules"])
        self.decisions = decisions_from(state["decisions"])


class SimilarModulesRest(Protection):
    r"""Adaptive training: the more alike two tasks are, the fewer modules train on the second.

        count = least + round((L - least) clip((high - s) / (high - low), 0, 1))

    with L modules and s the cosine of the two tasks' gradients. The last ones train, or with order="cosine" those whose
    own cosines are lowest, among equal ones the last. With low = high all train where s is below, and `least` where it
    is not. Both gradients are taken at the weights before the first task (`protect/similarity.py`), with rows of the
    head fitted to each task by itself, or to both together: these see that classes are shared, and need samples of the
    last task, which never train.

    Guard: where the shared part was learnt badly, keeping it helps nobody, however alike the tasks are. Rows fitted on
    the features as they are must not do much worse on the new task than they did on the last one just after it was
    learnt: (error - usual) / (chance - usual) above `guard` trains everything.

    Args:
        least: modules that train on the most similar task, beside the head.
        low: cosine at which all modules train.
        high: cosine at which `least` do.
        order: which modules train: the "last", or by their own "cosine"; modules under others that rest move what
            these have learnt to read, which costs more old accuracy than training the last.
        rows: what the rows of the head are fitted to: the "own" task, or both ("joint").
        metric: of similarity: "cosine", "preconditioned" as Adam does, or "signs".
        guard: see above; None for none.
        samples: of each task, for its gradient and the guard, at most.
        sketch: numbers kept of each module's gradient; all by default.
        modules: patterns of parameter names, one a module; by default the blocks of the stack (`modules_of`).

    Cost: in front of a task two passes forward and one backward of `samples`, and two readings of the task; twice the
    passes with joint rows. Memory: the trained parameters of the backbone twice, once with a sketch; with joint rows
    once, and `samples` of the last task.

    Source: arXiv 2602.20796, algorithm 1, which leaves metric's weights, thresholds and modules open.
    """

    def __init__(
        self,
        least: int = 0,
        low: float = 0.2,
        high: float = 0.5,
        *,
        order: Order = "last",
        rows: FittedTo = "own",
        metric: Metric = "cosine",
        guard: float | None = 0.75,
        samples: int = 1024,
        sketch: int | None = None,
        modules: Sequence[str] | None = None,
    ) -> None:
        require_integer("least", least)
        require_number("low", low, least=-1.0, most=1.0)
        require_number("high", high, least=low, most=1.0)
        require_choice("order", order, ORDERS)
        require_choice("rows", rows, FITTED_TO)
        require_choice("metric", metric, METRICS)
        require_integer("samples", samples, least=2)
        if guard is not None:
            require_number("guard", guard, most=1.0)
        if sketch is not None:
            require_integer("sketch", sketch, least=1)
        self.least, self.low, self.high = least, low, high
        self.order: Order = order
        self.rows: FittedTo = rows
        self.metric: Metric = metric
        self.guard, self.samples, self.sketch = guard, samples, sketch
        self.patterns = modules
        self.modules: Modules = {}
        self.decisions: list[Decision] = []
        self.point: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.kept: Labelled | None = None
        self.usual: float | None = None

    def begin_task(self, model: Model, task: TaskData) -> None:
        """Compare the task with the one before, and choose what trains.

        Raises:
            ValueError: a backbone of which nothing trains, or with fewer modules than `least`; gradients that are not
                finite.
        """
        if not self.modules:
            self.modules, self.point = modules_of(trainable(model.backbone), self.patterns), point_of(model.backbone)
        names = list(self.modules)
        if self.least > len(names):
            raise complaint(
                f"least={self.least} of {len(names)} modules", f"at most {len(names)}", f"They are {names}."
            )
        inputs, labels = drawn(task, self.samples)
        error, chance = (None, 0.0) if self.guard is None or task.index == 0 else probe_error(model, inputs, labels)
        with standing_at(model.backbone, self.point):
            by_module, cosine = self._compared(model, (inputs, labels))
        chosen, reason = self._chosen(task.index, by_module, cosine, error, chance)
        train_only(model, self.modules, chosen)
        decision = Decision(task.index, chosen, len(names), reason, cosine, by_module, error, self.usual)
        self.decisions.append(decision)

    def end_task(self, model: Model, task: TaskData) -> None:
        """Take note of how well rows fitted on the features do now."""
        if self.guard is not None:
            self.usual = probe_error(model, *drawn(task, self.samples))[0]

    def decided(self) -> list[dict[str, Any]]:
        """What trained in each task so far, and why."""
        return [decision.told() for decision in self.decisions]

    def state_dict(self) -> State:
        """All that the next comparison needs."""
        return {
            "modules": plain(self.modules),
            "decisions": self.decided(),
            "point": dict(self.point),
            "last": dict(self.last),
            "kept": self.kept,
            "usual": self.usual,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.modules = modules_from(state["modules"])
        self.decisions = decisions_from(state["decisions"])
        self.point, self.last, self.usual = dict(state["point"]), dict(state["last"]), state["usual"]
        self.kept = None if state["kept"] is None else (state["kept"][0], state["kept"][1])

    def _compared(self, model: Model, task: Labelled) -> tuple[dict[str, float], float | None]:
        """Cosines by module and of all, of the task's gradient and that of the one before; takes note of the task."""

        def gradient(samples: Labelled, rows: Rows | None = None) -> dict[str, Tensor]:
            return gradient_of(model, *samples, self.modules, rows=rows, metric=self.metric, sketch=self.sketch)

        if self.rows == "own":
            before, self.last = self.last, gradient(task)
            return cosines(self.last, before)
        before_it, self.kept = self.kept, task
        if before_it is None:
            return {}, None
        device = task[0].device
        both = task, (before_it[0].to(device), before_it[1].to(device))
        rows = fitted_rows(model, *both)
        return cosines(*(gradient(one, rows) for one in both))

    def _chosen(
        self, task: int, by_module: Mapping[str, float], cosine: float | None, error: float | None, chance: float
    ) -> tuple[tuple[str, ...], str]:
        names = tuple(self.modules)
        if task == 0:
            return names, "it is the first"
        if cosine is None:
            return names, "one of the two tasks has no gradient to compare"
        told = f"its gradient has cosine {cosine:.2f} to that of the task before"
        if self.guard is not None and error is not None and self.usual is not None:
            excess = (error - self.usual) / (chance - self.usual) if chance > self.usual else 1.0
            if excess > self.guard:
                return names, f"features as they are do badly on it (error {error:.2f}, usual {self.usual:.2f}); {told}"
        count = trained_modules(cosine, len(names), self.least, self.low, self.high)
        chosen = least_similar(by_module, count) if self.order == "cosine" else names[len(names) - count :]
        return chosen, f"{told} (all below {self.low:g}, {self.least} from {self.high:g} on)"


def trained_modules(cosine: float, modules: int, least: int = 0, low: float = 0.2, high: float = 0.5) -> int:
    """How many modules train: `least` from the cosine `high` on, all at `low` and below, linear in between.

    Examples:
        >>> [trained_modules(cosine, 12) for cosine in (0.1, 0.3, 0.5, 0.7)]
        [12, 8, 0, 0]
    """
    if cosine >= high:
        return least
    return modules if cosine <= low else least + round((modules - least) * (high - cosine) / (high - low))


def least_similar(by_module: Mapping[str, float], count: int) -> tuple[str, ...]:
    """The `count` modules with the lowest cosines, in the order of the model; among equal ones the last."""
    names = list(by_module)
    ranked = sorted(range(len(names)), key=lambda place: (round(by_module[names[place]], DIGITS), -place))
    return tuple(names[place] for place in sorted(ranked[:count]))
