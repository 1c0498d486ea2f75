"""Adaptive training: how much of the model learns a task depends on how alike it is to the one before."""

from collections.abc import Sequence

from forgetcast.methods.base import Model
from forgetcast.methods.sequential import Sequential
from forgetcast.protect.magnitude import FittedTo, Order, SimilarModulesRest
from forgetcast.protect.similarity import Metric


class Adaptive(Sequential):
    """Fine-tuning of the modules that the similarity of the tasks leaves, and of the head.

    Args:
        model: a backbone of which something trains, and head.
        least: modules that train on the most similar task, beside the head.
        low: cosine at which all modules train.
        high: cosine at which `least` do.
        order: which modules train: the "last", or those with the lowest "cosine" of their own.
        rows: of the head, with which gradients are compared: fitted to each task's "own" samples, or "joint"ly to those
            of both, which sees that classes are shared and keeps `samples` of the last task; these never train.
        metric: of similarity: "cosine", "preconditioned" as Adam does, or "signs".
        guard: how much worse features as they are may do on the new task, between 0 (no worse than on the last one)
            and 1 (guessing), before everything trains; None for no guard.
        samples: of each task, for its gradient and the guard, at most.
        sketch: numbers kept of each module's gradient; all by default.
        modules: patterns of parameter names, one a module; by default the blocks of the stack.
        loss_outputs: as for `Sequential`.

    Source: arXiv 2602.20796, algorithm 1, with both gradients taken at the same weights.
    """

    def __init__(
        self,
        model: Model,
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
        loss_outputs: str = "seen",
    ) -> None:
        rest = SimilarModulesRest(
            least,
            low,
            high,
            order=order,
            rows=rows,
            metric=metric,
            guard=guard,
            samples=samples,
            sketch=sketch,
            modules=modules,
        )
        super().__init__(model, [rest], loss_outputs=loss_outputs)
