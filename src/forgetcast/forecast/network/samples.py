"""Samples for a network: inputs of any nesting and their targets, given as arrays or by a loader."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from forgetcast.checks import complaint, require_finite
from forgetcast.tangent.inputs import sample_count, tensors, transformed


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs and targets in one order.

    Attributes:
        inputs: a tensor, or tensors nested in mappings (given to the model by name) or tuples (by place); the sample is
            every tensor's first axis.
        targets: labels (n,), values (n, C), or None.
        name: what error messages call them.
    """

    inputs: Any
    targets: Tensor | None
    name: str

    def __len__(self) -> int:
        return sample_count(self.inputs)

    def at(self, places: Tensor) -> "Samples":
        """The samples at `places`, copied."""
        targets = None if self.targets is None else self.targets[places.to(self.targets.device)]
        return Samples(transformed(self.inputs, lambda t: t[places.to(t.device)]), targets, self.name)

    def to(self, device: torch.device) -> "Samples":
        """The same samples on a device."""
        targets = None if self.targets is None else self.targets.to(device)
        return Samples(transformed(self.inputs, lambda t: t.to(device)), targets, self.name)


def samples_of(name: str, given: Any) -> Samples:
    """Samples from what a user gives.

    Args:
        name: "old" or "new", for messages.
        given: `Samples`; a pair (inputs, targets) of tensors or arrays; a mapping with "labels" beside its inputs, as
            Hugging Face batches have; a `DataLoader` (not shuffled) or list of such batches; or inputs alone.

    Raises:
        ValueError: no samples, tensors of different lengths, NaN or infinity, a shuffled loader.
    """
    if isinstance(given, Samples):
        return given
    if isinstance(given, DataLoader):
        if isinstance(given.sampler, RandomSampler):
            raise complaint(
                f"{name}: a DataLoader with shuffle=True",
                "the same order at every reading",
                "Give a DataLoader with shuffle=False: the training's own order comes from its seed.",
            )
        return _joined(name, given)
    if isinstance(given, list) and given and not isinstance(given[0], Tensor | np.ndarray):
        return _joined(name, given)
    inputs, targets = _parted(given)
    inputs = transformed(_tensors(inputs), lambda t: t)
    targets = None if targets is None else torch.as_tensor(targets)
    if any(tensor.ndim > 0 and len(tensor) == 0 for tensor in tensors(inputs)):
        raise complaint(f"{name}: no samples", "at least one sample", "Check what selects them.")
    count = sample_count(inputs)
    if targets is not None and len(targets) != count:
        raise complaint(
            f"{name}: {len(targets)} targets for {count} samples", "one for each", "Give both in the same order."
        )
    for tensor in tensors((inputs, *(() if targets is None else (targets,)))):
        if tensor.is_floating_point():
            require_finite(f"{name} samples", tensor)
    return Samples(inputs, targets, name)


def _parted(given: Any) -> tuple[Any, Any]:
    if isinstance(given, Mapping):
        rest = {key: value for key, value in given.items() if key != "labels"}
        return rest, given.get("labels")
    if isinstance(given, tuple) and len(given) == 2:
        return given
    return given, None


def _tensors(given: Any) -> Any:
    """The same nesting with arrays as tensors, without a copy where numpy allows."""
    if isinstance(given, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(given))
    if isinstance(given, Mapping):
        return {key: _tensors(value) for key, value in given.items()}
    return tuple(_tensors(part) for part in given) if isinstance(given, tuple | list) else given


def _joined(name: str, batches: Iterable[Any]) -> Samples:
    """Batches put together; texts padded to different lengths are padded to the longest with zeros."""
    parts = [samples_of(name, tuple(batch) if isinstance(batch, list) else batch) for batch in batches]
    if not parts:
        raise complaint(f"{name}: a loader without batches", "at least one sample", "Check its data set.")
    targets = [part.targets for part in parts if part.targets is not None]
    joined = torch.cat(targets) if len(targets) == len(parts) else None
    return Samples(_concatenated([part.inputs for part in parts]), joined, name)


def _concatenated(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Mapping):
        return {key: _concatenated([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(_concatenated([part[i] for part in parts]) for i in range(len(first)))
    longest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    return torch.cat([_padded(part, longest) for part in parts])


def _padded(tensor: Tensor, longest: list[int]) -> Tensor:
    if list(tensor.shape[1:]) == longest:
        return tensor
    whole = tensor.new_zeros(len(tensor), *longest)
    whole[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return whole
