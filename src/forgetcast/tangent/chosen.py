"""The outputs of a model as a function of some of its parameters, all else held."""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from forgetcast.checks import complaint
from forgetcast.modes import evaluating
from forgetcast.tangent.inputs import arguments, at, sample_count, transformed
from forgetcast.tangent.linearise import Point


class ChosenParameters:
    """`(places of samples, values of the parameters) -> outputs (b, c)`, in evaluation mode.

    Args:
        model: any module.
        inputs: all samples, in a nesting of tensors with the sample as first axis.
        parameters: those that vary, by the names that the model gives them.
        heads: from what the model returns to (samples, c).

    Attributes:
        samples: n.
        evaluated: samples that have gone through the model so far.

    Raises:
        ValueError: inputs without samples, parameters that the model does not have.
    """

    def __init__(
        self, model: nn.Module, inputs: Any, parameters: Mapping[str, Tensor], heads: Callable[[Any], Tensor]
    ) -> None:
        self.samples = sample_count(inputs)
        self.evaluated = 0
        self._model, self._inputs, self._heads, self._names = model, inputs, heads, list(parameters)
        own = dict(model.named_parameters(remove_duplicate=False))
        wrong = [name for name, values in parameters.items() if name not in own or values.shape != own[name].shape]
        if wrong or not parameters:
            raise complaint(
                f"got parameters {wrong[:4]} that the model does not have in this shape"
                if wrong
                else "got no parameters",
                f"names and shapes of its own, such as {list(own)[:4]}",
                "Take them from `trainable(model)`.",
            )
        chosen = {id(own[name]) for name in parameters}
        self._held = {name: held.detach() for name, held in model.named_parameters() if id(held) not in chosen}

    def __call__(self, rows: slice, point: Point) -> Tensor:
        """The outputs of the samples `rows` at `point`."""
        positional, named = arguments(transformed(at(self._inputs, rows), lambda tensor: tensor.to(point[0].device)))
        values = self._held | dict(zip(self._names, point, strict=True))
        with evaluating(self._model):
            answer = functional_call(self._model, values, positional, named)
        count = rows.stop - rows.start
        self.evaluated += count
        found = self._heads(answer)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != count or not found.is_floating_point():
            given = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise complaint(
                f"outputs {given} of {count} samples",
                "real numbers (samples, c)",
                "Give `outputs`, a function from what the model returns to them.",
            )
        return found

    def standing(self) -> Iterator[Tensor]:
        """Tensors that are in memory whatever is computed."""
        return chain(self._model.parameters(), self._model.buffers())
