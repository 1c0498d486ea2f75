"""The training itself, on the model: with all its samples the real run, with a few a batch a pilot of it."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from forgetcast.checks import complaint
from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.samples import Samples
from forgetcast.forecast.network.surrogate import Objective
from forgetcast.forecast.network.walker import Path, Place
from forgetcast.forecast.simulate import batches
from forgetcast.forecast.training import SGD, AdamW, GradientDescent, clip_gradients, rate_at, sgd
from forgetcast.modes import evaluating
from forgetcast.tangent.capture import requiring
from forgetcast.tangent.inputs import called


def trained_path(
    net: Network,
    new: Samples,
    training: SGD | AdamW | GradientDescent,
    readings: Sequence[int],
    *,
    samples: int | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> Path:
    """Train the model for real, in evaluation mode (no dropout), and put it back.

    Args:
        net: the model, at the start of the training.
        new: all new samples.
        training: minibatches, or full batches.
        readings: steps after which the place is wanted.
        samples: of each batch, only so many; the first ones. None for the whole batch: the real run.
        on_step: called with the number of each step that is done.

    Raises:
        ValueError: a training that diverges.

    A summed loss over fewer samples is scaled up to the batch.

    Cost: one pass forward and backward for every sample of every step.
    """
    assert new.targets is not None
    trained = [*net.body.values(), *net.of_head.values()]
    chosen: list[Tensor] = [*trained]
    places = {0: Place(net.theta(), net.weight(), net.bias())} if 0 in readings else {}
    with net.restored(), evaluating(net.model), requiring(net.model, trained):
        start = [parameter.detach().clone() for parameter in chosen]
        optimizer = sgd(training, chosen) if isinstance(training, GradientDescent) else training.optimizer(chosen)
        order = _order(training, len(new), samples)
        for step in range(max(readings, default=0)):
            taken = next(order)
            part = new.at(taken if samples is None else taken[:samples]).to(net.device)
            assert part.targets is not None
            logits = net.read(called(net.model, part.inputs))
            error = Objective(training, part.targets, net.outputs).error(logits.detach())
            optimizer.zero_grad()
            scale = 1.0 if training.reduction == "mean" else len(taken)
            logits.backward(error * (scale / len(part)))  # type: ignore[no-untyped-call]
            for parameter, first in zip(chosen, start, strict=True):
                if parameter.grad is not None and training.drift_penalty:
                    parameter.grad.add_(parameter.detach() - first, alpha=training.drift_penalty)
            clip_gradients(training, chosen)
            optimizer.param_groups[0]["lr"] = rate_at(training.learning_rate, step)
            before = None if net.restraint is None else (net.theta(), net.weight(), net.bias())
            optimizer.step()
            if before is not None:
                after = net.theta(), net.weight(), net.bias()
                net.restrain(before, after)
                net.put(*after)
            if step + 1 in readings:
                place = Place(net.theta(), net.weight(), net.bias())
                if not all(bool(torch.isfinite(values).all()) for values in (place.theta, place.weight)):
                    raise complaint("a training that diverges", "one that stays finite", "Lower the learning rate.")
                places[step + 1] = place
            on_step(step + 1)
    return Path(places, (), (), (), (), ())


def _order(training: SGD | AdamW | GradientDescent, rows: int, samples: int | None) -> Iterator[Tensor]:
    if not isinstance(training, GradientDescent):
        yield from batches(training, rows)
        return
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.arange(rows) if samples is None else torch.randperm(rows, generator=generator)
