"""How much a forecast owes to the samples that it happened to read: two halves of it, and how far they part.

Each half follows the training by anchors of its own, and so walks the same way with other noise. The whole has read
twice as much as either; its error is about that of their mean,

    || drift_A - drift_B || / (2 || drift ||)

Source: derived; beside measured errors in docs/forecast_results.md.
"""

from collections.abc import Iterator, Sequence

import torch

from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.plan import checked
from forgetcast.forecast.network.result import Reading, read_at
from forgetcast.forecast.network.samples import Samples
from forgetcast.forecast.network.steps import Batching
from forgetcast.forecast.network.walker import Path, Place, follow
from forgetcast.forecast.training import SGD, AdamW, GradientDescent


def sampling_error(
    net: Network,
    old: Samples,
    training: SGD | AdamW | GradientDescent,
    path: Path,
    readings: Sequence[Reading],
    batching: Batching,
) -> float | None:
    """Of the last reading, on some of the old samples; None where there are no halves, or nothing drifts.

    The halves are read with all of their motion, whatever share of it the forecast believes: the rest of it is what is
    uncertain.

    Cost: two passes over some old samples, and what following the path has cost.
    """
    places = torch.linspace(0, len(old) - 1, checked(len(old))).long()
    few, rows = old.at(places), places.to(net.device)
    size = float((readings[-1].logits[rows] - readings[0].logits[rows]).double().norm())
    ends = [read_at(net, few, readings[-1].step, place) for place in _ends(net, training, path, readings, batching)]
    if not ends or size == 0:
        return None
    first, second = ends
    return float((first.logits - second.logits).double().norm()) / (2 * size)


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
