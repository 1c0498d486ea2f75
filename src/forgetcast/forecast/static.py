r"""The one-point forecast for networks: the tangent at the start of the new task, frozen for the whole training.

    drift of the old outputs = J_old delta,      delta = -J_new^T phi(K_nn) r      (squared loss)

Exact for a linear head on a frozen body; for anything else an approximation that gets worse with every step away from
the start. The kernel between old and new samples is never formed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint, require_finite
from forgetcast.forecast.displacement import Displacement, closed_displacement, simulated_displacement
from forgetcast.forecast.path import check_seen, describe, dial_values
from forgetcast.forecast.result import Cost
from forgetcast.forecast.static_plan import Form, StaticPlan, static_plan
from forgetcast.forecast.training import Training, is_closed_form
from forgetcast.tangent.features import check_targets, target_matrix
from forgetcast.tangent.jacobian import Choice, jacobian, logits_of, trainable
from forgetcast.tangent.operator import TangentOperator
from forgetcast.tangent.products import Tangent, TangentMatrix


@dataclass(frozen=True, eq=False)
class StaticDrift:
    """Drift of old outputs when the tangent is frozen at the start.

    Attributes:
        dials: values of the training's dial (steps, time or penalty), the training's own last.
        drifts: (t, n, C) change of the old outputs at each.
        deltas: (t, P) float64 change of the parameters, flattened in the order of `names`.
        names: of the parameters that move.
        before: (n, C) the old outputs now.
        status: "converged", "exact" or "stopped" for the worst Krylov space; "simulated" where there is none.
        residual: of that space, relative to the residual it started from.
        products: products with the tangent kernel, or steps.
        side: "dual", "primal" or "simulation".
        plan: what was planned.
        cost: seconds and sweeps over old and new samples, forward and backward ones alike.
    """

    dials: tuple[float, ...]
    drifts: Float[Tensor, "t n C"]
    deltas: Float[Tensor, "t P"]
    names: tuple[str, ...]
    before: Float[Tensor, "n C"]
    status: str
    residual: float
    products: int
    side: str
    plan: StaticPlan
    cost: Cost

    @property
    def drift(self) -> Float[Tensor, "n C"]:
        """At the end of the training."""
        return self.drifts[-1]

    @property
    def delta(self) -> Float[Tensor, " P"]:
        """At the end of the training."""
        return self.deltas[-1]


def static_drift(
    model: nn.Module,
    old: Any,
    new: Any,
    targets: Tensor,
    training: Training,
    parameters: Choice = None,
    *,
    outputs: Callable[[Any], Tensor] | None = None,
    dials: Sequence[float] = (),
    form: Form = "auto",
    strategy: str = "auto",
    tolerance: float = 1e-6,
    most: int = 1000,
    chunk: int | None = None,
    memory: float = 2.0**31,
) -> StaticDrift:
    r"""Drift of the old outputs for a training on new samples, with the tangent frozen at the start.

    Args:
        model: as it is before the new task.
        old: old inputs; a tensor, or tensors nested in mappings (by name) or tuples (by place), sample first.
        new: new inputs, likewise.
        targets: labels (n_new,) or values (n_new, C).
        training: how the new task will be trained; all that `forecast_linear` takes.
        parameters: that train: names, a filter, or None for all that require gradients.
        outputs: from what the model returns to (samples, C).
        dials: further steps, times or penalties at which the drift is wanted; one Krylov space serves all.
        form: "explicit", "matrix-free" or the cheaper of them.
        strategy: of `J v`, see `TangentOperator`.
        tolerance: of the Krylov space; an iteration that stops short of it says so in `status`.
        most: products at most.
        chunk: samples that go through the model together.
        memory: bytes for the Jacobian as a matrix, and for graphs.

    Raises:
        ValueError: what does not fit; an unstable learning rate; minibatches where the Jacobian does not fit in memory.

    Cost: see `StaticPlan`; one `J v` over the old samples for each dial.
    Source: arXiv 2606.18024, Proposition 1 (squared loss with a drift penalty); other trainings derived likewise.
    """
    started = perf_counter()
    chosen = trainable(model, parameters)
    read = logits_of if outputs is None else outputs
    seen = slice(None) if training.classes is None else sorted(training.classes)
    old_tangent = TangentOperator(model, old, chosen, read, strategy=strategy, chunk=chunk, memory=memory)
    _check_classes(training, old_tangent.outputs)

    def heads(found: Any) -> Tensor:
        return read(found)[:, seen]

    new_tangent = TangentOperator(model, new, chosen, heads, strategy=strategy, chunk=chunk, memory=memory)
    _check_targets(targets, training, new_tangent.samples, old_tangent.outputs)
    before, value = old_tangent.value(), new_tangent.value()
    require_finite("old outputs", before)
    require_finite("new outputs", value)
    plan = static_plan(
        training,
        *(new_tangent.samples, new_tangent.outputs, new_tangent.parameters),
        element_bytes=value.element_size(),
        graph_bytes=new_tangent.samples * new_tangent.sample_bytes,
        memory=memory,
        form=form,
    )
    tangent: Tangent = new_tangent
    if plan.form == "explicit":
        tangent = TangentMatrix(jacobian(model, new, chosen, heads, chunk=chunk), value)
    theta = torch.cat([values.detach().flatten() for values in chosen.values()]).double()
    points = _points(training, dials)
    if is_closed_form(training):
        residual = value.double() - target_matrix("new", targets, old_tangent.outputs, value.double())[:, seen]
        found = closed_displacement(
            tangent, residual, theta, training, points, tolerance=tolerance, most=most, product_type=value.dtype
        )
    else:
        steps = [int(point) for point in points]
        found = simulated_displacement(tangent, targets, old_tangent.outputs, theta, training, steps)
    drifts = old_tangent.forward(found.deltas).to(before)
    passes = {"old": round(sum(old_tangent.passes.values())), "new": round(sum(new_tangent.passes.values()))}
    if plan.form == "explicit":
        passes["new"] += 1 + new_tangent.outputs
    cost = Cost(perf_counter() - started, passes, plan.form)
    outcome = _outcome(found, plan)
    return StaticDrift(points, drifts, found.deltas, tuple(chosen), before, *outcome, found.side, plan, cost)


def _points(training: Training, dials: Sequence[float]) -> tuple[float, ...]:
    """The values of the dial that are asked for, the training's own last."""
    final = getattr(training, training.dial)
    asked = {"steps": None, "time": None, "penalty": None} | {training.dial: [*dials, final]}
    return dial_values(describe(training), final, **asked)[1]


def _outcome(found: Displacement, plan: StaticPlan) -> tuple[str, float, int]:
    """Status, residual and products of the worst Krylov space; steps of a simulation."""
    if not found.spaces:
        return "simulated", 0.0, plan.products
    worst = max(found.spaces, key=lambda space: ("exact", "converged", "stopped").index(space.status))
    products = sum(space.products for space in found.spaces)
    return worst.status, max(space.residual for space in found.spaces), products


def _check_classes(training: Training, outputs: int) -> None:
    if training.classes is not None and max(training.classes) >= outputs:
        raise complaint(
            f"got training.classes={training.classes} for a model of {outputs} outputs",
            f"outputs in 0 .. {outputs - 1}",
            "Grow the model's head first.",
        )


def _check_targets(targets: Tensor, training: Training, samples: int, outputs: int) -> None:
    if len(targets) != samples:
        raise complaint(f"{len(targets)} targets for {samples} new samples", "one for each", "Give both in one order.")
    check_seen("new", check_targets("new", targets, outputs), training.classes)
