"""`forecast`: what fine-tuning a network on new data will do to its old answers, before the first gradient step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from forgetcast.checks import complaint, require_choice, require_finite, require_integer, require_number
from forgetcast.forecast.linear import forecast_linear
from forgetcast.forecast.network.anchored import anchored_path
from forgetcast.forecast.network.draw import draw
from forgetcast.forecast.network.head import Network, network, probed
from forgetcast.forecast.network.pilot import trained_path
from forgetcast.forecast.network.placed import place_rows
from forgetcast.forecast.network.plan import FORWARD, HALF_OLD, Budget, plan_anchors
from forgetcast.forecast.network.result import NetworkForecast, Reading
from forgetcast.forecast.network.samples import Samples, samples_of
from forgetcast.forecast.network.steps import Batching
from forgetcast.forecast.network.stock import stock
from forgetcast.forecast.network.surrogate import Objective
from forgetcast.forecast.network.trust import Trust
from forgetcast.forecast.network.walker import Path, Place, batching_of, follow
from forgetcast.forecast.path import check_seen, describe
from forgetcast.forecast.result import Cost
from forgetcast.forecast.static import static_drift
from forgetcast.forecast.training import SGD, AdamW, GradientDescent, Training
from forgetcast.tangent.features import Features, check_targets
from forgetcast.tangent.inputs import tensors
from forgetcast.tangent.jacobian import Choice, logits_of, trainable
from forgetcast.tangent.linear_head import LinearHead

Estimator = Literal["auto", "linear", "anchored", "pilot", "static"]
ESTIMATORS: tuple[Estimator, ...] = ("auto", "linear", "anchored", "pilot", "static")
Outputs = Callable[[Any], Tensor] | Sequence[int] | None
SAME = 1e-6


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
    head: Literal["as_is", "placed"] = "as_is",
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
    read = logits_of if outputs is None else outputs if callable(outputs) else _columns(outputs)
    chosen = trainable(model, parameters)
    old_samples, new_samples = samples_of("old", old), samples_of("new", new)
    device = next(model.parameters()).device
    net = network(model, new_samples.at(torch.arange(min(2, len(new_samples)))).to(device), chosen, read)
    if _shapes(old_samples) != _shapes(new_samples):
        probed(model, old_samples.at(torch.arange(min(2, len(old_samples)))).to(device), read)
    described = describe(training)
    if outputs is not None and not callable(outputs):
        old_samples, new_samples = (_renumbered(samples, outputs) for samples in (old_samples, new_samples))
        training = _seeing(training, outputs)
    old_samples, new_samples = _checked(net, old_samples, new_samples, training)
    with net.restored():
        phi = scores = None
        if head == "placed":
            phi, scores = _place(net, old_samples, new_samples, training)
        before = _read_old(net, old_samples, 0, Place(net.theta(), net.weight(), net.bias()))
        require_finite("old logits", before.logits)
        estimator = _choose(estimator, net, training)
        if estimator in ("linear", "static"):
            return _closed(net, before, old_samples, new_samples, training, described, estimator, started)
        assert isinstance(training, SGD | AdamW | GradientDescent)
        batching = batching_of(training, len(new_samples))
        degenerate = _degenerate(net, new_samples, training)
        look = scores is None and not degenerate and estimator == "anchored"
        plan = plan_anchors(
            steps=training.steps,
            batch=round(batching.size),
            new=len(new_samples) if samples_new is None else min(samples_new, len(new_samples)),
            old=len(old_samples),
            budget=budget,
            look=look,
            half=estimator == "anchored",
        )
        if estimator == "pilot":
            path, plan = _pilot(net, new_samples, training, plan, budget, len(old_samples), on_step)
        else:
            path = _anchored(net, new_samples, training, plan, phi, scores, samples_new, seed, on_step)
        readings = (before, *(_read_at(net, old_samples, step, place) for step, place in sorted(path.places.items())))
        sampling = None
        if path.surrogates and not plan.exact and max(len(near) for near in path.surrogates) > 1:
            sampling = _sampling_error(net, old_samples, training, path, readings, batching)
    silent = bool(net.body) and bool(path.surrogates) and not bool(path.surrogates[0].gradients.any())
    blind = sum(path.blind) / max(len(path.blind), 1)
    passes = {"old": len(readings) - 1 + (sampling is not None), "new": round(plan.new_cost / len(new_samples))}
    return NetworkForecast(
        drift=readings[-1].logits - before.logits,
        logits_before=before.logits,
        targets=old_samples.targets,
        settings={"training": described, "estimator": estimator, "budget": budget, "head": head, "seed": seed},
        cost=Cost(perf_counter() - started, passes, estimator),
        estimator=estimator,
        trust=Trust(sampling, path.surrogate_error, blind, degenerate, plan.exact, silent),
        share_of_run=plan.share,
        readings=readings,
        batching=batching,
        training=training,
        _net=net,
        _surrogates=path.surrogates,
        _windows=path.windows,
        _stock=path.stock,
    )


def _shapes(samples: Samples) -> list[tuple[int, ...]]:
    return [tuple(part.shape[1:]) for part in tensors(samples.inputs)]


def _columns(outputs: Sequence[int]) -> Callable[[Any], Tensor]:
    chosen = sorted({int(output) for output in outputs})
    if not chosen or len(chosen) != len(outputs):
        raise complaint(f"got outputs={list(outputs)}", "distinct outputs, at least one", "Leave None for all.")

    def read(found: Any) -> Tensor:
        logits: Tensor = logits_of(found)
        if not 0 <= chosen[0] <= chosen[-1] < logits.shape[-1]:
            raise complaint(
                f"got outputs={list(outputs)} for a model of {logits.shape[-1]} outputs",
                f"outputs in 0 .. {logits.shape[-1] - 1}",
                "Grow the model's head first.",
            )
        return logits[:, chosen]

    return read


def _renumbered(samples: Samples, outputs: Sequence[int]) -> Samples:
    """Labels as places among the chosen outputs."""
    if samples.targets is None or samples.targets.ndim != 1:
        return samples
    chosen = torch.tensor(sorted(int(output) for output in outputs))
    check_seen(samples.name, samples.targets, tuple(chosen.tolist()))
    return replace(samples, targets=torch.searchsorted(chosen, samples.targets.cpu()))


def _seeing(training: Training, outputs: Sequence[int]) -> Training:
    """The training with its classes as places among the chosen outputs."""
    if training.classes is None:
        return training
    chosen = sorted(int(output) for output in outputs)
    strangers = sorted(set(training.classes) - set(chosen))
    if strangers:
        raise complaint(
            f"got training.classes={training.classes} with outputs={list(outputs)}",
            "classes among the outputs",
            f"Add {strangers} to outputs, or leave them out of classes.",
        )
    return replace(training, classes=tuple(chosen.index(label) for label in training.classes))


def _checked(net: Network, old: Samples, new: Samples, training: Training) -> tuple[Samples, Samples]:
    if new.targets is None:
        raise complaint("new: no targets", "labels or values to train on", "Give new=(inputs, targets).")
    if training.classes is not None and max(training.classes) >= net.outputs:
        raise complaint(
            f"got training.classes={training.classes} for a model of {net.outputs} outputs",
            f"outputs in 0 .. {net.outputs - 1}",
            "Grow the model's head first.",
        )
    checked = []
    for samples in (old, new):
        targets = samples.targets
        checked.append(
            samples if targets is None else replace(samples, targets=check_targets(samples.name, targets, net.outputs))
        )
    check_seen("new", checked[1].targets, training.classes)  # type: ignore[arg-type]
    return checked[0], checked[1]


def _choose(estimator: Estimator, net: Network, training: Training) -> Estimator:
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
    if estimator == "auto":
        if only_head:
            return "linear"
        squared = isinstance(training, GradientDescent) and training.loss == "squared"
        return "static" if squared or not by_steps else "anchored"
    if estimator in ("anchored", "pilot") and not by_steps:
        raise complaint(
            f"estimator={estimator!r} for a {type(training).__name__}", "a training in steps", "Choose 'static'."
        )
    return estimator


def _place(net: Network, old: Samples, new: Samples, training: Training) -> tuple[Tensor, Tensor]:
    """Place the new rows; the sizes of the new samples' errors afterwards."""
    if net.head is None or "weight" not in net.of_head:
        raise complaint(
            "head='placed' for a model without a linear head that trains",
            "logits that come straight from an nn.Linear with requires_grad",
            "Leave head='as_is'.",
        )
    targets = new.targets
    if targets is None or targets.ndim != 1 or (old.targets is not None and old.targets.ndim != 1):
        raise complaint("head='placed' with targets that are no labels", "labels (n,)", "Leave head='as_is'.")
    known = set() if old.targets is None else set(old.targets.tolist())
    rows = sorted(set(targets.tolist()) - known)
    phi = net.features(new.to(net.device))
    if len(rows) > 1:
        own = torch.isin(targets, torch.tensor(rows))
        place_rows(net.head, phi[own.to(phi.device)], targets[own].to(phi.device), rows)
    return phi, _errors(net, phi, targets, training)


def _errors(net: Network, phi: Tensor, targets: Tensor, training: Training) -> Tensor:
    """Size of d loss / d phi of each sample at the present head."""
    weight = net.weight()
    error = Objective(training, targets, net.outputs).error(phi @ weight.T + net.bias())
    sizes: Tensor = (error @ weight).norm(dim=1)
    return sizes


def _degenerate(net: Network, new: Samples, training: Training) -> bool:
    """Whether the head does not tell the new labels apart: their rows are equal, and the body has no tangent there.

    With one new label, the rows of all outputs that the loss sees.
    """
    if net.head is None or not net.body or new.targets is None or new.targets.ndim != 1:
        return False
    named = sorted(set(new.targets.tolist()))
    seen = range(net.outputs) if training.classes is None else training.classes
    rows = net.weight()[named if len(named) > 1 else list(seen)]
    size = float(net.weight().norm(dim=1).max())
    spread = float((rows - rows[0]).norm(dim=1).max())
    return spread <= SAME * max(size, SAME)


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
) -> Path:
    pool = new
    if samples_new is not None and samples_new < len(new) and not plan.exact:
        kept = draw(new.targets, len(new), None, seed).anchor(0, samples_new)[0]
        pool, scores = new.at(kept), None if scores is None else scores[kept.to(scores.device)]
        phi = None if phi is None else phi[kept.to(phi.device)]
    if plan.looked:
        seen = torch.sort(draw(pool.targets, len(pool), None, seed).anchor(0, plan.looked)[0]).values
        pool = pool.at(seen)
        assert pool.targets is not None
        phi = net.features(pool.to(net.device))
        scores = _errors(net, phi, pool.targets, training)
    drawn = draw(pool.targets, len(pool), scores, seed)
    keep = not plan.exact
    held = None
    if phi is not None and pool.targets is not None and net.of_head and net.body:
        held = stock(phi, Objective(training, pool.targets, net.outputs), len(pool) == len(new))
    return anchored_path(net, pool, training, plan, drawn, population=len(new), stock=held, keep=keep, on_step=on_step)


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


def _read_old(net: Network, old: Samples, step: int, place: Place) -> Reading:
    return Reading(step, place, net.features(old.to(net.device)))


def _read_at(net: Network, old: Samples, step: int, place: Place) -> Reading:
    with net.restored():
        net.put(place.theta, place.weight, place.bias)
        return _read_old(net, old, step, place)


def _sampling_error(
    net: Network,
    old: Samples,
    training: SGD | AdamW | GradientDescent,
    path: Path,
    readings: Sequence[Reading],
    batching: Batching,
) -> float | None:
    """How far the old drift moves with every other sample of each anchor, and the noise of a run's batches."""
    halves = [near.part(torch.arange(0, len(near), 2)) for near in path.surrogates]
    step = readings[-1].step
    windows = [2 * count for count in path.windows]  # as many samples in use, so that the optimiser sees as much noise
    noise = torch.Generator().manual_seed(0)
    again = follow(
        net, training, readings[0].place, halves, [step], batching, windows, generator=noise, stock=path.stock
    )
    place = again.places[step]
    few = torch.linspace(0, len(old) - 1, min(len(old), HALF_OLD)).long()
    before = readings[0].logits[few.to(net.device)]
    drift = readings[-1].logits[few.to(net.device)] - before
    size = float(drift.double().norm())
    if size == 0:
        return None
    half = _read_at(net, old.at(few), step, place).logits - before
    return float((half - drift).double().norm()) / size


def _closed(
    net: Network,
    before: Reading,
    old: Samples,
    new: Samples,
    training: Training,
    described: dict[str, Any],
    estimator: Estimator,
    started: float,
) -> NetworkForecast:
    """Forecasts in closed form: of a linear head exactly, of a network at the tangent of its start."""
    start = before.place
    assert new.targets is not None
    steps = int(getattr(training, "steps", 0))
    if estimator == "linear":
        assert net.head is not None
        head = LinearHead.from_module(net.head)
        phi = Features(net.features(new.to(net.device)), new.targets, name="new")
        made = forecast_linear(Features(before.features, old.targets, name="old"), phi, head, training)
        after = made.head_after
        like = start.weight
        weight, bias = torch.as_tensor(after.weight).T.to(like), after.bias
        place = Place(start.theta, weight, start.bias if bias is None else torch.as_tensor(bias).to(like))
        drift, cost = made.drift, made.cost
        trust = Trust(None, None, 0.0, False, exact=True)
        end = Reading(steps, place, before.features)
    else:
        chosen = [*net.body.values(), *net.of_head.values()]
        names = [name for name, parameter in net.model.named_parameters() if any(parameter is p for p in chosen)]
        found = static_drift(
            net.model,
            old.to(net.device).inputs,
            new.to(net.device).inputs,
            new.targets.to(net.device),
            training,
            names,
            outputs=net.read,
        )
        drift = found.drift
        trust = Trust(None, None, 0.0, _degenerate(net, new, training))
        cost = replace(found.cost, passes={**found.cost.passes, "old": found.cost.passes["old"] + 1})
        every = dict(net.model.named_parameters())
        with net.restored(), torch.no_grad():
            parts = torch.split(found.delta, [every[name].numel() for name in found.names])
            for name, part in zip(found.names, parts, strict=True):
                every[name].add_(part.view_as(every[name]).to(every[name]))
            end = _read_old(net, old, steps, Place(net.theta(), net.weight(), net.bias()))
    batching = Batching(float(len(new)), len(new))
    if isinstance(training, SGD | AdamW | GradientDescent):
        batching = batching_of(training, len(new))
    run = steps * batching.size
    units = len(new) * sum([cost.passes.get("new", 0) * FORWARD])
    return NetworkForecast(
        drift=drift,
        logits_before=before.logits,
        targets=old.targets,
        settings={"training": described, "estimator": estimator},
        cost=Cost(perf_counter() - started, cost.passes, cost.form),
        estimator=estimator,
        trust=trust,
        share_of_run=units / run if run else 0.0,
        readings=(before, end),
        batching=batching,
        training=training,
        _net=net,
        _surrogates=(),
    )
