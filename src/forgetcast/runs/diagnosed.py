"""Where a forecast drift comes from and along which answers it lies, in plain JSON values."""

from collections.abc import Hashable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.forecast.network.diagnostics import compare_drift
from forgetcast.forecast.network.layers import drift_by_layer, kernel_movement
from forgetcast.forecast.network.result import NetworkForecast
from forgetcast.runs.upcoming import Upcoming

KERNEL_SAMPLES = 64
NAMED = 2


def diagnosed(
    ahead: Upcoming, found: NetworkForecast, classes: Sequence[str], measured: Float[Tensor, "n C"] | None
) -> dict[str, Any]:
    """Which layers carry the forecast drift, how far their kernels move, and the energy of the drift by direction.

    Args:
        ahead: the task that was forecast.
        found: the forecast.
        classes: names of the outputs.
        measured: old logits after the real training; directions are those of the measured drift.

    Cost: 2 + 2 passes a group of layers over the old samples, and two trace kernels of some dozens of them.
    """
    layers = drift_by_layer(ahead.model, ahead.old, found)
    inputs = ahead.old[0]
    few = torch.linspace(0, len(inputs) - 1, min(len(inputs), KERNEL_SAMPLES)).long()
    kernels = kernel_movement(ahead.model, inputs[few], found)
    layers = layers.join(kernels.add_prefix("kernel_"))
    return {
        "layers": [{"layer": name} | _plain(row) for name, row in layers.to_dict("index").items()],
        "kernel": _plain(kernels.loc["all"].to_dict()),
        "directions": None if measured is None else _directions(found, classes, measured),
    }


def _directions(found: NetworkForecast, classes: Sequence[str], measured: Tensor) -> list[dict[str, Any]]:
    compared = compare_drift(found, measured)
    rows = compared.per_direction.to_dict("records")
    largest = compared.directions.abs().topk(min(NAMED, len(classes)), dim=1).indices.tolist()
    return [{"classes": [classes[k] for k in top]} | _plain(row) for top, row in zip(largest, rows, strict=True)]


def _plain(row: Mapping[Hashable, Any]) -> dict[str, Any]:
    """Numbers that are not finite as None, which JSON knows."""
    return {str(key): None if isinstance(value, float) and not isfinite(value) else value for key, value in row.items()}
