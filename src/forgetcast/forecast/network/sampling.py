"""How much a forecast owes to the samples that it happened to read: two halves of it, and how far they part.

Each half follows the training by anchors of its own, and so walks the same way with other noise. The whole has read
twice as much as either; its error is about that of their mean,

    || drift_A - drift_B || / (2 || drift ||)

Which of the old classes suffer is decided by the drift of their own outputs. That is the smaller part of the drift
where the new outputs rise, and the body makes all of it: it has an error of its own, over these outputs alone.

Source: derived; beside measured errors in docs/forecast_results.md.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.plan import checked
from forgetcast.forecast.network.result import Reading, read_at
from forgetcast.forecast.network.samples import Samples
from forgetcast.forecast.network.steps import Batching
from forgetcast.forecast.network.trust import SamplingError
from forgetcast.forecast.network.walker import Path, Place, follow
from forgetcast.forecast.training import SGD, AdamW, GradientDescent


def sampling_error(
    net: Network,
    old: Samples,
    training: SGD | AdamW | GradientDescent,
    path: Path,
    readings: Sequence[Reading],
    batching: Batching,
) -> SamplingError | None:
    """Of the last reading, on some of the old samples; None where there are no halves, or nothing drifts.

    The halves are read with all of their motion, whatever share of it the forecast believes: the rest of it is what is
    uncertain.

    Args:
        net: the model, at the start; its parameters move and are put back.
        old: the old samples.
        training: that the path follows.
        path: with its surrogates.
        readings: of the old samples, the start first.
        batching: of the run.

    Cost: two passes over some old samples, and what following the path has cost.
    """
    places = torch.linspace(0, len(old) - 1, checked(len(old))).long()
    few, rows = old.at(places), places.to(net.device)
    drift = readings[-1].logits[rows] - readings[0].logits[rows]
    ends = [read_at(net, few, readings[-1].step, place) for place in _ends(net, training, path, readings, batching)]
    if not ends:
        return None
    apart = ends[0].logits - ends[1].logits
    whole = _relative(apart, drift)
    if whole is None:
        return None
    if old.targets is None or old.targets.is_floating_point():
        return SamplingError(whole, None)
    own = torch.unique(old.targets).to(net.device)
    return SamplingError(whole, _relative(apart[:, own], drift[:, own]))


def _relative(apart: Float[Tensor, "m k"], drift: Float[Tensor, "m k"]) -> float | None:
    size = float(drift.double().norm())
    return float(apart.double().norm()) / (2 * size) if size > 0 else None


def _ends(
    net: Network,
    training: SGD | AdamW | GradientDescent,
    path: Path,
    readings: Sequence[Reading],
    batching: Batching,
) -> Iterator[Place]:
    """Where the training ends by every other anchor, and by the others; of the first anchor each has half.

    The samples of an anchor lie class by class: halves of each anchor would have seen different classes.
    """
    (first, *known), *later = zip(path.surrogates, path.windows, path.shares, strict=True)
    if len(first) < 2:
        return
    for turn in (0, 1):
        half = first.part(torch.arange(turn, len(first), 2))
        parts, windows, shares = zip((half, *known), *later[turn::2], strict=True)
        place, step = readings[0].place, readings[-1].step
        end = follow(net, training, place, parts, [step], batching, windows, shares, stock=path.stock, half=turn).whole
        assert end is not None
        yield end
