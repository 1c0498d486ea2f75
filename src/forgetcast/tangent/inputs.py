"""Inputs of any nesting whose tensors all have the sample as first axis: count them, cut them, call a model on them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from forgetcast.checks import complaint


def tensors(inputs: Any) -> Iterator[Tensor]:
    """Every tensor inside nested mappings, tuples and lists, in order."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping):
        for part in inputs.values():
            yield from tensors(part)
    elif isinstance(inputs, tuple | list):
        for part in inputs:
            yield from tensors(part)


def sample_count(inputs: Any) -> int:
    """Number of samples n, the length of every tensor's first axis.

    Raises:
        ValueError: no tensor, a tensor without axes, no samples, or tensors of different lengths.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors(inputs)]
    lengths = {shape[0] if shape else None for shape in shapes}
    if len(lengths) != 1 or None in lengths or 0 in lengths:
        raise complaint(
            f"got inputs with tensors of shapes {shapes}",
            "at least one tensor and one sample, with the sample as first axis of every tensor",
            "Repeat what the samples share (position ids, masks) once a sample, or let the model hold it.",
        )
    return int(lengths.pop() or 0)


def transformed(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with every tensor changed; mappings come back as dictionaries."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {name: transformed(part, change) for name, part in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(transformed(part, change) for part in inputs)
    return inputs


def at(inputs: Any, places: slice) -> Any:
    """The samples at `places`; views."""
    return transformed(inputs, lambda tensor: tensor[places])


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments: a mapping is unpacked by name, a tuple or list by place."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def called(model: nn.Module, inputs: Any) -> Any:
    """`model(**inputs)`, `model(*inputs)` or `model(inputs)`."""
    positional, named = arguments(inputs)
    return model(*positional, **named)
