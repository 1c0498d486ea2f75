"""Which modules train on a task: the decision, what carries it out, and what of it is kept."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from forgetcast.forecast.network.modules import Modules
from forgetcast.methods.base import Model


@dataclass(frozen=True)
class Decision:
    """Which modules train on a task, and why.

    Attributes:
        task: counted from 0.
        trained: modules that train, in the order of the model; the head always does.
        modules: how many there are.
        reason: in words.
        cosine: of the gradients of this task and of the one before, over all modules.
        cosines: by module.
        probe_error: of rows fitted on the features as they are.
        usual_error: the same just after the task before was learnt, on its own samples.
    """

    task: int
    trained: tuple[str, ...]
    modules: int
    reason: str
    cosine: float | None = None
    cosines: Mapping[str, float] = field(default_factory=dict)
    probe_error: float | None = None
    usual_error: float | None = None

    @property
    def text(self) -> str:
        """In a sentence."""
        return f"task {self.task}: {len(self.trained)} of {self.modules} modules train, because {self.reason}"

    def told(self) -> dict[str, Any]:
        """Plain JSON values, the sentence among them."""
        return {"text": self.text, **asdict(self), "trained": list(self.trained)}


def train_only(model: Model, modules: Modules, chosen: Sequence[str]) -> None:
    """Let the parameters of the chosen modules train, and those of the others not, without gradients of before."""
    let_train(dict(model.backbone.named_parameters()), all_of(modules.values()), all_of(modules[one] for one in chosen))


def let_train(named: Mapping[str, nn.Parameter], known: Iterable[str], chosen: Collection[str]) -> None:
    """Of the known parameters let the chosen ones train, and no others; what rests keeps no gradient of before."""
    for name in known:
        named[name].requires_grad_(name in chosen)
        if name not in chosen:
            named[name].grad = None


def all_of(parts: Iterable[Sequence[str]]) -> list[str]:
    """One after the other."""
    return [name for part in parts for name in part]


def plain(modules: Modules) -> list[list[Any]]:
    """Modules as JSON values, in their order."""
    return [[name, list(own)] for name, own in modules.items()]  # a list: JSON objects need not keep their order


def modules_from(state: Sequence[Sequence[Any]]) -> Modules:
    """What `plain` made plain."""
    return {name: tuple(own) for name, own in state}


def decisions_from(state: Sequence[Mapping[str, Any]]) -> list[Decision]:
    """Decisions as they were told."""
    known = [{key: value for key, value in one.items() if key != "text"} for one in state]
    return [Decision(**{**one, "trained": tuple(one["trained"])}) for one in known]
