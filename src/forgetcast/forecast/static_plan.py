"""Whether a frozen tangent is worth a matrix: what both ways cost, from sizes alone."""

from dataclasses import dataclass
from math import log, sqrt
from typing import Literal

from forgetcast.checks import complaint, require_choice
from forgetcast.forecast.training import SGD, AdamW, GradientDescent, Training, is_closed_form

Form = Literal["auto", "explicit", "matrix-free"]
UNKNOWN_PRODUCTS = 100  # of a Krylov space, where the training does not bound curvature times time


@dataclass(frozen=True)
class StaticPlan:
    """How a static forecast computes with the new samples' tangent, and what that is expected to cost.

    Attributes:
        form: "explicit" (the Jacobian as a matrix, from backward passes) or "matrix-free" (products J v and J^T u).
        rows: samples x outputs of J.
        parameters: columns of J.
        matrix_bytes: what J takes as a matrix.
        products: expected products with the kernel, or steps of a simulation.
        explicit_passes: forward passes over the new samples that the matrix costs.
        free_passes: forward passes that the products cost without it.
        reason: for the choice.
    """

    form: Literal["explicit", "matrix-free"]
    rows: int
    parameters: int
    matrix_bytes: int
    products: int
    explicit_passes: float
    free_passes: float
    reason: str


def static_plan(
    training: Training,
    samples: int,
    outputs: int,
    parameters: int,
    *,
    element_bytes: int,
    graph_bytes: int,
    memory: float,
    form: Form = "auto",
) -> StaticPlan:
    """Plan a static forecast.

    A Jacobian of c outputs costs 1 + 1.1 c forward passes. A product with the kernel costs 2.1 while the graphs fit in
    memory and 5 otherwise; full-batch descent that is stable needs at most about `sqrt(5 (N / 2) ln 1e7)` of them for N
    steps without momentum.

    Args:
        training: of the new task.
        samples: n.
        outputs: c that the loss sees.
        parameters: P that train.
        element_bytes: of one number of J.
        graph_bytes: of the graphs of all samples.
        memory: bytes to use at most.
        form: "auto", or the form wanted.

    Raises:
        ValueError: a form that the training or the memory does not allow.
    """
    require_choice("form", form, ("auto", "explicit", "matrix-free"))
    rows = samples * outputs
    matrix_bytes = rows * parameters * element_bytes
    products = expected_products(training, min(rows, parameters))
    explicit = 2 + 1.1 * outputs
    free = products * (2.1 if graph_bytes <= memory else 5.0)
    batched = isinstance(training, SGD | AdamW)
    fits = matrix_bytes <= memory
    if batched and (form == "matrix-free" or not fits):
        raise complaint(
            f"minibatches with form={form!r}, memory={memory:.2g} and a Jacobian of {rows} x {parameters} numbers, "
            f"{matrix_bytes:.2g} bytes",
            "the Jacobian as a matrix, whose rows a minibatch takes",
            "Raise memory, give fewer new samples, or describe the training as full-batch GradientDescent.",
        )
    if form == "explicit" and not fits:
        raise complaint(
            f"form='explicit' with a Jacobian of {matrix_bytes:.2g} bytes and memory={memory:.2g}",
            "a Jacobian that fits",
            "Raise memory, or let form='auto' choose.",
        )
    if form != "auto":
        return StaticPlan(form, rows, parameters, matrix_bytes, products, explicit, free, "as asked")
    if batched:
        return StaticPlan("explicit", rows, parameters, matrix_bytes, products, explicit, free, "minibatches take rows")
    if not fits:
        reason = "the matrix does not fit in memory"
        return StaticPlan("matrix-free", rows, parameters, matrix_bytes, products, explicit, free, reason)
    cheaper: Literal["explicit", "matrix-free"] = "explicit" if explicit <= free else "matrix-free"
    return StaticPlan(cheaper, rows, parameters, matrix_bytes, products, explicit, free, "fewer passes")


def expected_products(training: Training, dimension: int) -> int:
    """Products with the kernel that a training is expected to take: steps where it is run, else those of Lanczos."""
    if not is_closed_form(training):
        return training.steps
    if not isinstance(training, GradientDescent):
        return min(dimension, UNKNOWN_PRODUCTS)
    time = 2 * training.steps * (1 + training.momentum) / (1 - training.momentum)  # a stable rate times the curvature
    return min(dimension, max(training.steps, 1), int(sqrt(5 * time / 4 * log(1e7))) + 1)
