"""Experience replay: old samples beside the new."""

from forgetcast.checks import require_choice
from forgetcast.methods.base import Model
from forgetcast.methods.sequential import Sequential
from forgetcast.protect.memory import Exemplars, Reservoir
from forgetcast.protect.replay import Replay


class ExperienceReplay(Sequential):
    """Fine-tuning with `Replay`.

    Args:
        model: backbone and head.
        capacity: samples kept.
        count: old samples drawn for each batch.
        strength: weight of their cross-entropy.
        select: "reservoir", a uniform sample of all seen, or "herding", the most typical of each class.
        loss_outputs: as for `Sequential`.
        seed: of the memory.

    Source: arXiv 1902.10486.
    """

    def __init__(
        self,
        model: Model,
        capacity: int = 500,
        count: int = 32,
        *,
        strength: float = 1.0,
        select: str = "reservoir",
        loss_outputs: str = "seen",
        seed: int = 0,
    ) -> None:
        require_choice("select", select, ("reservoir", "herding"))
        memory = Reservoir(capacity, seed) if select == "reservoir" else Exemplars(capacity, seed)
        super().__init__(model, [Replay(memory, count, strength)], loss_outputs=loss_outputs)
