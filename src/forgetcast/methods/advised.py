"""Training of as much of the model as a forecast advises, task by task."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from forgetcast.checks import complaint, require_integer, require_number
from forgetcast.forecast.network.advice import Advice, advise
from forgetcast.methods.base import Model, State, TaskData
from forgetcast.methods.sequential import Sequential
from forgetcast.methods.viewed import viewed
from forgetcast.protect.decision import let_train
from forgetcast.protect.memory import Exemplars
from forgetcast.protect.parameters import trainable
from forgetcast.protect.similarity import point_of


class Advised(Sequential):
    """Fine-tuning of the modules, and as far along the way, as `advise` recommends before each task.

    Before every task but the first, every candidate (the head alone, with the last 1, 2, 4, ... modules, all) is
    forecast on samples kept of old tasks and on the new ones; the one with the highest forecast accuracy over all
    classes, within the limit, trains. With a length below 1 the model goes back that share of the way at the task's
    end: theta <- theta_old + length (theta - theta_old), the head and running statistics of what trains included.

    Args:
        model: a backbone of which something trains, and a linear head.
        max_drop: largest forecast drop of old accuracy that is fine; None for any. Where nothing stays within it, the
            least drop is taken.
        lengths: shares of the way to choose from.
        budget: cost of the forecasts relative to training every candidate.
        capacity: samples kept of old tasks, equally many a class, to read the forecasts on; they never train.
        modules: patterns of parameter names, one a module; by default the blocks of the stack.
        loss_outputs: as for `Sequential`.
        seed: of the forecasts' draws.

    Source: the choice of arXiv 2602.20796, made by forecast instead of by the cosine of two gradients.
    """

    def __init__(
        self,
        model: Model,
        max_drop: float | None = None,
        lengths: Sequence[float] = (1.0,),
        *,
        budget: float = 0.15,
        capacity: int = 256,
        modules: Sequence[str] | None = None,
        loss_outputs: str = "seen",
        seed: int = 0,
    ) -> None:
        super().__init__(model, loss_outputs=loss_outputs)
        require_integer("capacity", capacity, least=1)
        require_number("budget", budget, strict=True)
        for name, values in (("max_drop", () if max_drop is None else (max_drop,)), ("lengths", tuple(lengths))):
            for value in values:
                require_number(name, value, most=1.0)
        self.max_drop, self.lengths, self.budget = max_drop, tuple(lengths), budget
        self.patterns, self.seed = modules, seed
        self.memory = Exemplars(capacity, seed)
        self.names: tuple[str, ...] = ()
        self.length = 1.0
        self.start: dict[str, Tensor] = {}
        self.decisions: list[dict[str, Any]] = []

    def begin_task(self, task: TaskData) -> None:
        """Ask for advice, and let train what it says.

        Raises:
            ValueError: a loop that does not say how it trains, and whatever `advise` refuses.
        """
        earlier = self.seen
        super().begin_task(task)
        if len(self.memory) == 0:  # nothing has been learnt
            self.names = tuple(trainable(self.model))
            return
        named = dict(self.model.named_parameters())
        let_train(named, self.names, self.names)
        advice = self._advice(task, earlier)
        let_train(named, self.names, self._own(advice))
        self.length = advice.recommended.length
        self.start = point_of(self.model) if self.length < 1 else {}
        self.decisions.append(_told(task.index, advice))

    def plain_outputs(self) -> tuple[int, ...] | None:
        """None where the model may go back some of the way: the end is not that of the steps alone."""
        return super().plain_outputs() if self.lengths == (1.0,) else None

    def end_task(self, task: TaskData) -> None:
        """Go back to where the advice was to stop, and keep samples."""
        now = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        with torch.no_grad():
            for name, before in self.start.items():
                if before.is_floating_point():
                    now[name].copy_(torch.lerp(before.to(now[name]), now[name], self.length))
        self.start, self.length = {}, 1.0
        super().end_task(task)
        self.memory.remember(self.model, task)

    def decided(self) -> list[dict[str, Any]]:
        """What was advised for each task, and what was forecast of it."""
        return [*super().decided(), *self.decisions]

    def state_dict(self) -> State:
        """With the samples, and where the task at hand began."""
        own = {"names": list(self.names), "length": self.length, "start": dict(self.start)}
        return {**super().state_dict(), **own, "memory": self.memory.state_dict(), "decisions": list(self.decisions)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        super().load_state_dict(state)
        self.names, self.length, self.start = tuple(state["names"]), state["length"], dict(state["start"])
        self.memory.load_state_dict(state["memory"])
        self.decisions = [dict(decision) for decision in state["decisions"]]

    def _advice(self, task: TaskData, earlier: tuple[int, ...]) -> Advice:
        if task.training is None:
            raise complaint(
                "a task that does not say how it is trained",
                "TaskData.training, as forgetcast's own loop gives it",
                "Describe the training: fc.SGD(...) or fc.AdamW(...).",
            )
        batches = list(task.batches())
        device = next(self.model.parameters()).device
        kept = self.memory.draw(len(self.memory))
        old = kept["inputs"].to(device), kept["labels"].to(device)
        new = tuple(torch.cat([getattr(batch, part) for batch in batches]) for part in ("inputs", "labels"))
        outputs = int(self.model.head.outputs)  # type: ignore[arg-type]
        seen = super().plain_outputs() or self.seen
        training = replace(task.training(), classes=seen if len(seen) < outputs else None)
        return advise(
            viewed(self.model),
            old,
            new,
            training,
            lengths=self.lengths,
            modules=self.patterns,
            budget=self.budget,
            max_drop=self.max_drop,
            old_weight=len(earlier) / len(self.seen),
            answers_now=_among(earlier, outputs),
            answers_then=_among(self.seen, outputs),
            answers_new=_among(self.seen, outputs),
            seed=self.seed,
        )

    def _own(self, advice: Advice) -> list[str]:
        """Names in the method's model of what is to train: the forecast's model shares the parameters."""
        chosen = dict(viewed(self.model).named_parameters())
        wanted = {id(chosen[name]) for name in advice.recommended.candidate.parameters}
        return [name for name, parameter in self.model.named_parameters() if id(parameter) in wanted]


def _among(outputs: Sequence[int], count: int) -> Tensor:
    allowed = torch.zeros(1, count, dtype=torch.bool)
    allowed[0, list(outputs)] = True
    return allowed


def _told(task: int, advice: Advice) -> dict[str, Any]:
    """Plain JSON values."""
    best = advice.recommended
    numbers = {key: getattr(best, key) for key in ("length", "old_accuracy", "drop", "new_accuracy", "score")}
    return {
        "task": task,
        "text": f"task {task}: {advice.reason}",
        "candidate": best.candidate.name,
        "trained": best.trained,
        "trusted": best.trusted,
        "cost": advice.share,
        **numbers,
    }
