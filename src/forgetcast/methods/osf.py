r"""OSF by `peft`: linear layers train outside the leading singular directions of what they are, more of them each task.

    1. before task t the weight of each layer is split:  W = U_k S_k V_k^T + U S V^T,  k a share rho_t of its directions
    2. U, S, V and the task's rows of the head train on the cross-entropy over the task's classes; the k leading
       triplets are frozen, and steps are such that  U_k^T dW = 0,  dW V_k = 0
    3. then the layer is made plain, W <- U_k S_k V_k^T + U S V^T, which changes no answer
    4. the next task splits that weight, with a larger share: 0.3, 0.5, 0.7 in `peft`'s own continual example

No equation is named here: it is what `peft` does (0.21.2), by its own layers, decomposition and merging. It is a
method and no tuner: k is another for each task, so layers are split and joined between tasks, which a tuner in place
does not know of; and S, which scales directions, acts in no space of activations, of which a tuner would tell.

Where this differs from that example, and why:

- Layers are joined by merging. The example calls `unload`, which of this version of `peft` gives the weights back as
  they were before the task.
- Steps are projected. `peft` projects gradients, which is the same for SGD; of Adam's steps a good part lies in the
  frozen directions (`projected="gradient"` does as `peft`).
- Classes come from one linear head that grows, whose old rows stand still; the example is of language models.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from forgetcast.checks import complaint, require_choice
from forgetcast.methods.base import Model, Protection, State, TaskData
from forgetcast.methods.sequential import Sequential
from forgetcast.protect.projected import StandingRows
from forgetcast.protect.trailing import TrailingSteps
from forgetcast.tuners.anatomy import Anatomy
from forgetcast.tuners.base import freeze
from forgetcast.tuners.split import Rank, join, layers_to_split, require_rank, split

HEADS = ("rows", "free")
PROJECTED = ("step", "gradient")


class OSF(Sequential):
    """Fine-tuning of the trailing singular directions of a transformer's linear layers.

    Args:
        model: a transformer, which is frozen but for these, and head.
        ranks: of each task in turn, the last that of all that follow: below 1 the share rho of the directions of each
            layer that is kept, as a whole number how many.
        targets: of "query", "key", "value", "fused", "enter" and "leave" (of the feed-forward network); None for every
            linear layer of a block.
        layers: which blocks; None for all.
        projected: "step", so that the leading directions stay whatever the optimiser; or "gradient", as `peft` does
            alone, which a forecast does not follow.
        head: "rows" of old outputs stand still; or it is "free", which lets a head learn on where classes come again.
        loss_outputs: as for `Sequential`.
        parts: where the blocks are; found by name.

    Raises:
        ValueError: no rank, or one that leaves a layer nothing to keep or nothing to train.

    Cost: a step of full fine-tuning of these layers, and four thin products each; before a task a singular value
    decomposition a layer. Memory: the weights, whatever the number of tasks; within a task, of a square one, up to
    1 + 4 (1 - rho) times as much.

    Source: arXiv 2504.07097; `peft.OSFConfig`.
    """

    needs_blocks = True

    def __init__(
        self,
        model: Model,
        ranks: Sequence[float | int] = (0.3, 0.5, 0.7),
        *,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        projected: Literal["step", "gradient"] = "step",
        head: Literal["rows", "free"] = "rows",
        loss_outputs: str = "task",
        parts: Anatomy | None = None,
    ) -> None:
        require_choice("head", head, HEADS)
        require_choice("projected", projected, PROJECTED)
        if not ranks:
            raise complaint("got ranks=[]", "one for each task, or one for all", "Give some, such as [0.3, 0.5, 0.7].")
        steps: list[Protection] = [TrailingSteps()] if projected == "step" else []
        rows: list[Protection] = [StandingRows()] if head == "rows" else []
        super().__init__(model, [*steps, *rows], loss_outputs=loss_outputs)
        self.names = layers_to_split(model.backbone, targets, layers, parts)
        for rank in ranks:
            require_rank(model.backbone, self.names, rank)
        freeze(model.backbone)
        self.ranks, self.projected = tuple(ranks), projected
        self.rank: Rank | None = None

    def plain_outputs(self) -> tuple[int, ...] | None:
        """The chosen outputs; None where gradients are projected, which a forecast knows nothing of."""
        return super().plain_outputs() if self.projected == "step" else None

    def begin_task(self, task: TaskData) -> None:
        """Split the layers as they are now."""
        self._split(self.ranks[min(task.index, len(self.ranks) - 1)])
        super().begin_task(task)

    def end_task(self, task: TaskData) -> None:
        """Make them plain again, with what they have learnt."""
        super().end_task(task)
        join(self.model.backbone)
        self.rank = None

    def state_dict(self) -> State:
        """That of every method, and the rank within a task."""
        return {**super().state_dict(), "rank": self.rank}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, within a task or between two."""
        join(self.model.backbone, merge=False)
        self.rank = None
        if state["rank"] is not None:
            self._split(state["rank"])
        super().load_state_dict(state)

    def _split(self, rank: Rank) -> None:
        split(self.model.backbone, self.names, rank, hooks=self.projected == "gradient")
        self.rank = rank
