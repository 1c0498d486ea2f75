"""`forecast`: what fine-tuning a network on new data will do to its old answers, before the first gradient step."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from forgetcast.checks import complaint, require_choice, require_integer, require_number
from forgetcast.forecast.network.along import along, start_reading
from forgetcast.forecast.network.anchored import anchored_path
from forgetcast.forecast.network.closed import closed
from forgetcast.forecast.network.draw import draw
from forgetcast.forecast.network.given import Given, Outputs, given
from forgetcast.forecast.network.head import Network, Restraint
from forgetcast.forecast.network.pilot import trained_path
from forgetcast.forecast.network.plan import FORWARD, Budget, plan_anchors
from forgetcast.forecast.network.result import NetworkForecast
from forgetcast.forecast.network.samples import Samples
from forgetcast.forecast.network.start import Head, Start, degenerate, pulls, read_start
from forgetcast.forecast.network.stock import stock
from forgetcast.forecast.network.surrogate import Objective
from forgetcast.forecast.network.walker import Path, batching_of
from forgetcast.forecast.network.window import MOST_ROWS
from forgetcast.forecast.training import SGD, AdamW, GradientDescent, Training
from forgetcast.tangent.jacobian import Choice

Estimator = Literal["auto", "linear", "anchored", "pilot", "static"]
ESTIMATORS: tuple[Estimator, ...] = ("auto", "linear", "anchored", "pilot", "static")


def forecast(
    model: nn.Module,
    old: Any,
    new: Any,
    training: Training,
    *,
    parameters: Choice = None,
    outputs: Outputs = None,
    estimator: Estimator = "auto",
    budget: float = 0.15,
    samples_new: int | None = None,
    head: Head = "as_is",
    restraint: Restraint | None = None,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda _: None,
) -> NetworkForecast:
    r"""Say what a training will do to the old answers of a network, before its first gradient step.

    The model is left as it is: parameters, modes, gradients. It is evaluated without dropout.

    Args:
        model: any module; its last linear layer, if its output is the logits, is treated exactly.
        old: old samples: (inputs, targets), a mapping with "labels", or a loader of such batches. Inputs are a tensor,
            or tensors in mappings (by name) or tuples (by place). Without labels there is drift but no accuracy.
        new: samples of the new task, likewise, in the order that the training's seed or order refers to.
        training: how the new task will be trained.
        parameters: that train: names, a filter of (name, parameter), or None for all that require gradients.
        outputs: from what the model returns to logits (n, C); a set of outputs, if loss and forecast see no others; or
            None for the tensor itself, or its `logits`. With a set, labels and `training.classes` keep the model's
            numbers when given; the forecast holds the chosen outputs in rising order, and labels as places among them.
        estimator: "linear" (only the head trains: exact); "anchored" (few samples at anchors along the predicted path);
            "pilot" (the training itself with a few samples a batch); "static" (the tangent at the start, arXiv
            2606.18024); "auto": linear where exact, static for squared loss in full batches, else anchored.
        budget: cost as a share of the training's, in passes of one sample; 1 replays the training itself.
        samples_new: draw from so many new samples at most.
        head: "placed" fits the rows of labels that the old samples do not have on frozen features first, in the
            forecast as the training is meant to; `forecast.start` holds the placed head.
        restraint: what becomes of each step of the optimiser: (parameters before it, the step), by name, to what is
            taken of it; for gradient projection `Projection.restrained`. None where all of it is.
        seed: of the draw.
        on_step: called with the number of each step that is done.

    Returns:
        The forecast, with the estimator that made it, its own check (`trust`), and its cost.

    Raises:
        ValueError: what does not fit; a budget below one reading of the old samples; a training that diverges.

    Cost: `share_of_run` of the training at most `budget` (a little less), plus one pass over the old samples for the
        logits before; with head="placed" one pass over the new ones, which the training needs as well.

    Examples:
        >>> import torch, forgetcast as fc
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        >>> old = torch.randn(40, 8), torch.randint(0, 2, (40,))
        >>> new = torch.randn(60, 8), torch.randint(2, 4, (60,))
        >>> seen = fc.forecast(model, old, new, fc.AdamW(learning_rate=1e-3, steps=20, batch_size=16), budget=0.6)
        >>> seen.estimator, seen.drift.shape
        ('anchored', torch.Size([40, 4]))
    """
    started = perf_counter()
    require_choice("estimator", estimator, ESTIMATORS)
    require_choice("head", head, ("as_is", "placed"))
    require_number("budget", budget, strict=True)
    require_integer("seed", seed)
    if samples_new is not None:
        require_integer("samples_new", samples_new, least=1)
    asked = given(model, old, new, training, parameters, outputs, restraint)
    with asked.net.restored():
        start = read_start(asked, head)
        return forecast_from(
            asked,
            start,
            estimator=estimator,
            budget=budget,
            samples_new=samples_new,
            seed=seed,
            on_step=on_step,
            started=started,
        )


def forecast_from(
    asked: Given,
    start: Start,
    *,
    estimator: Estimator,
    budget: float,
    samples_new: int | None,
    seed: int,
    on_step: Callable[[int], None],
    started: float,
    readings: int = 3,
    most_rows: int = MOST_ROWS,
) -> NetworkForecast:
    """As `forecast`, of what has been checked and of a model that stands at a start that has been read.

    `readings` is how often the old samples are read on the way at most, `most_rows` how many samples of anchors are in
    use together.
    """
    net, old_samples, new_samples, training = asked.net, asked.old, asked.new, asked.training
    estimator = chosen_estimator(estimator, net, training)
    if estimator in ("linear", "static"):
        before = start_reading(net, start)
        return closed(net, before, old_samples, new_samples, training, asked.described, estimator, started, start.new)
    assert isinstance(training, SGD | AdamW | GradientDescent)
    batching = batching_of(training, len(new_samples))
    unseen = start.scores is None and estimator == "anchored"
    plan = plan_anchors(
        steps=training.steps,
        batch=round(batching.size),
        new=len(new_samples) if samples_new is None else min(samples_new, len(new_samples)),
        old=len(old_samples),
        budget=budget,
        readings=readings,
        look=unseen,
        fresh=unseen and degenerate(net, new_samples, training),
        half=estimator == "anchored",
    )
    if estimator == "pilot":
        path, plan = _pilot(net, new_samples, training, plan, budget, len(old_samples), on_step)
    else:
        path = _anchored(
            net, new_samples, training, plan, start.new, start.scores, samples_new, seed, on_step, most_rows
        )
    settings = {"estimator": estimator, "budget": budget, "seed": seed}
    return along(asked, start, path, plan, settings, estimator=estimator, started=started)


def chosen_estimator(estimator: Estimator, net: Network, training: Training) -> Estimator:
    """What "auto" comes to.

    Raises:
        ValueError: an estimator that does not fit.
    """
    only_head = (
        net.head is not None and not net.body and set(net.of_head) == {name for name, _ in net.head.named_parameters()}
    )
    if estimator == "linear" and not only_head:
        raise complaint(
            f"estimator='linear' where {len(net.body)} parameter tensors outside the head train",
            "a linear head on a frozen body",
            "Choose 'auto'.",
        )
    by_steps = isinstance(training, SGD | AdamW | GradientDescent)
    if estimator in ("linear", "static") and net.restraint is not None:
        raise complaint(
            f"estimator={estimator!r} with a restraint of steps",
            "one that follows them",
            "Choose 'anchored' or 'auto'.",
        )
    if estimator == "auto":
        if net.restraint is not None:
            return "anchored"
        if only_head:
            return "linear"
        squared = isinstance(training, GradientDescent) and training.loss == "squared"
        return "static" if squared or not by_steps else "anchored"
    if estimator in ("anchored", "pilot") and not by_steps:
        raise complaint(
            f"estimator={estimator!r} for a {type(training).__name__}", "a training in steps", "Choose 'static'."
        )
    return estimator


def _anchored(
    net: Network,
    new: Samples,
    training: SGD | AdamW | GradientDescent,
    plan: Budget,
    phi: Tensor | None,
    scores: Tensor | None,
    samples_new: int | None,
    seed: int,
    on_step: Callable[[int], None],
    most_rows: int,
) -> Path:
    pool = new
    if samples_new is not None and samples_new < len(new) and not plan.exact:
        kept = draw(new.targets, len(new), None, seed).anchor(0, samples_new)[0]
        pool, scores = new.at(kept), None if scores is None else scores[kept.to(scores.device)]
        phi = None if phi is None else phi[kept.to(phi.device)]
    if plan.looked:
        pool = pool.at(torch.sort(draw(pool.targets, len(pool), None, seed).anchor(0, plan.looked)[0]).values)
        phi = net.features(pool.to(net.device))
        assert pool.targets is not None
        scores = pulls(net, phi, pool.targets, training)
    held = None
    if phi is not None and pool.targets is not None and net.of_head and net.body:
        held = stock(phi, Objective(training, pool.targets, net.outputs), len(pool) == len(new))
    return anchored_path(
        net,
        pool,
        training,
        plan,
        draw(pool.targets, len(pool), scores, seed),
        population=len(new),
        stock=held,
        keep=not plan.exact,
        most_rows=most_rows,
        on_step=on_step,
    )


def _pilot(
    net: Network,
    new: Samples,
    training: SGD | AdamW | GradientDescent,
    plan: Budget,
    budget: float,
    old: int,
    on_step: Callable[[int], None],
) -> tuple[Path, Budget]:
    """The training with as many samples of each batch as the budget pays for."""
    if plan.exact:
        return trained_path(net, new, training, plan.readings, on_step=on_step), plan
    reading = FORWARD * old * len(plan.readings)
    samples = int((budget * plan.run - reading) / training.steps)
    if samples < 1:
        least = max(1.5 * training.steps, training.steps + FORWARD * old)
        raise complaint(
            f"budget={budget:g} for a pilot of {training.steps} steps, with {old} old samples to read",
            f"at least {ceil(1000 * least / plan.run) / 1000:g}: one sample a step, two thirds of the budget",
            "Raise budget, or choose 'anchored'.",
        )
    path = trained_path(net, new, training, plan.readings, samples=samples, on_step=on_step)
    new_cost = float(samples * training.steps)
    return path, replace(plan, cost=new_cost + reading, new_cost=new_cost, anchors=(), looked=0, checks=0)
