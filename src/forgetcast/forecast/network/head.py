r"""The linear head of a network, if it ends in one: its part of a training is linear and is treated exactly.

    logits = W phi(inputs; theta) + b

phi are the features that the body (all other trainable parameters, theta) produces.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint
from forgetcast.forecast.network.samples import Samples
from forgetcast.modes import evaluating
from forgetcast.tangent.inputs import at, called, sample_count, tensors
from forgetcast.tangent.jacobian import logits_of

Read = Callable[[Any], Tensor]
Named = Mapping[str, Tensor]
Parts = tuple[Tensor, Tensor, Tensor]
Restraint = Callable[[Named, Named], Named]
"""(parameters before a step, the step) -> what is taken of it, by the names of the parameters."""


@dataclass(frozen=True, eq=False)
class Network:
    """A model seen as body and head.

    Attributes:
        model: the whole.
        read: from what the model returns to logits (n, C).
        head: the layer whose output the logits are, or None; then the logits themselves count as features and an
            identity as the head.
        body: trainable parameters outside the head, by name.
        of_head: trainable parameters of the head: "weight", "bias".
        outputs: C.
        width: d, of the features.
        restraint: what becomes of every step of the training; None where it is taken as it is.
    """

    model: nn.Module
    read: Read
    head: nn.Linear | None
    body: dict[str, nn.Parameter]
    of_head: dict[str, nn.Parameter]
    outputs: int
    width: int
    restraint: Restraint | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def weight(self) -> Float[Tensor, "C d"]:
        """W now, copied; an identity without a head."""
        if self.head is None:
            like = next(iter(self.body.values()))
            return torch.eye(self.outputs, dtype=like.dtype, device=like.device)
        return self.head.weight.detach().clone()

    def bias(self) -> Float[Tensor, " C"]:
        """B now, copied; zeros without one."""
        if self.head is None or self.head.bias is None:
            like = self.weight()
            return like.new_zeros(len(like))
        return self.head.bias.detach().clone()

    def theta(self) -> Float[Tensor, " P"]:
        """The body's parameters now, flattened in order, copied."""
        if not self.body:
            return self.weight().new_zeros(0)
        return torch.cat([parameter.detach().flatten() for parameter in self.body.values()])

    def put(self, theta: Float[Tensor, " P"], weight: Float[Tensor, "C d"], bias: Float[Tensor, " C"]) -> None:
        """Write parameters into the model."""
        sizes = [parameter.numel() for parameter in self.body.values()]
        with torch.no_grad():
            for parameter, part in zip(self.body.values(), torch.split(theta, sizes), strict=True):
                parameter.copy_(part.view_as(parameter))
            if "weight" in self.of_head:
                self.of_head["weight"].copy_(weight)
            if "bias" in self.of_head:
                self.of_head["bias"].copy_(bias)

    def restrain(self, before: Parts, after: Parts) -> None:
        """Take back of a step, from `before` to `after` (theta, weight, bias), what the restraint does not let pass."""
        if self.restraint is None:
            return
        start, end = self._named(before), self._named(after)
        allowed = self.restraint(start, {name: value - start[name] for name, value in end.items()})
        for name, value in end.items():
            value.copy_(start[name] + allowed[name])

    def _named(self, parts: Parts) -> dict[str, Tensor]:
        """Views of parameters by their names in the model."""
        theta, weight, bias = parts
        pieces = torch.split(theta, [parameter.numel() for parameter in self.body.values()])
        found = {name: part.view_as(value) for (name, value), part in zip(self.body.items(), pieces, strict=True)}
        own = {
            id(value): part
            for key, part in (("weight", weight), ("bias", bias))
            if (value := self.of_head.get(key)) is not None
        }
        head = {name: own[id(value)] for name, value in self.model.named_parameters() if id(value) in own}
        return found | head

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Body and head as they were, gradients included, afterwards; also after an error."""
        chosen = [*self.body.values(), *(() if self.head is None else self.head.parameters())]
        before = [(parameter.detach().clone(), parameter.grad) for parameter in chosen]
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, (value, gradient) in zip(chosen, before, strict=True):
                    parameter.copy_(value)
                    parameter.grad = gradient

    @contextmanager
    def tapped(self) -> Iterator[list[Tensor]]:
        """The features of the last forward pass inside, in the graph, as the only element of a list."""
        kept: list[Tensor] = []
        if self.head is None:
            yield kept
            return

        def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            kept[:] = [_input_of(given, named)]

        handle = self.head.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield kept
        finally:
            handle.remove()

    def features_of(self, found: Any, kept: list[Tensor]) -> Float[Tensor, "n d"]:
        """Features of a forward pass: what the head was given, or the logits."""
        return self.read(found) if self.head is None else kept[0]

    def features(self, samples: Samples, chunk: int = 64) -> Float[Tensor, "n d"]:
        """Features of all samples at the model's present parameters. Cost: one forward pass."""
        parts = []
        with torch.no_grad(), evaluating(self.model), self.tapped() as kept:
            for start in range(0, len(samples), chunk):
                found = called(self.model, at(samples.inputs, slice(start, start + chunk)))
                parts.append(self.features_of(found, kept).detach())
        return torch.cat(parts)


def network(model: nn.Module, samples: Samples, parameters: Mapping[str, nn.Parameter], read: Read | None) -> Network:
    """Look for the linear head of a model, on one or two samples.

    The head is the `nn.Linear` whose output is the very tensor that `read` returns, called once, on one feature
    vector a sample, and whose parameters nothing else holds. A hook that changes the output makes it no head.

    Raises:
        ValueError: inputs that the model does not take; logits that are not (n, C).
    """
    read = logits_of if read is None else read
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def keep(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        calls.append((layer, _input_of(given, named), output))

    layers = [module for module in model.modules() if type(module) is nn.Linear]
    handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
    few = slice(0, min(2, sample_count(samples.inputs)))
    try:
        logits = probed(model, samples, read)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != few.stop:
        given = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise complaint(
            f"{given} for {few.stop} samples", "(samples, outputs)", "Give `outputs`, a function of the model's output."
        )
    last = [(layer, given) for layer, given, output in calls if output is logits and given.ndim == 2]
    uses = [layer for layer, _, _ in calls]
    head = last[0][0] if len(last) == 1 and uses.count(last[0][0]) == 1 else None
    if head is not None and (_shared(model, head) or not _linear(head, last[0][1], logits)):
        head = None
    own = {id(parameter): name for name, parameter in head.named_parameters()} if head is not None else {}
    of_head = {own[id(parameter)]: parameter for parameter in parameters.values() if id(parameter) in own}
    body = {name: parameter for name, parameter in parameters.items() if id(parameter) not in own}
    width = last[0][1].shape[1] if head is not None else logits.shape[1]
    return Network(model, read, head, body, of_head, logits.shape[1], width)


def probed(model: nn.Module, samples: Samples, read: Read) -> Any:
    """What `read` makes of the model's answer to one or two samples.

    Raises:
        ValueError: inputs that the model does not take.
    """
    few = at(samples.inputs, slice(0, 2))
    try:
        with torch.no_grad(), evaluating(model):
            return read(called(model, few))
    except (RuntimeError, TypeError, IndexError) as error:
        raise complaint(
            f"{samples.name}: inputs of shapes {[tuple(part.shape) for part in tensors(few)]} that the model, or what "
            f"reads its outputs, does not take ({type(error).__name__}: {error})",
            "what its `forward` takes: a tensor, tensors by name in a mapping, or by place in a tuple",
            "Compare with a batch that it was trained on.",
        ) from error


def _input_of(given: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    found: Tensor = given[0] if given else named["input"]
    return found


def _linear(head: nn.Linear, features: Tensor, logits: Tensor) -> bool:
    with torch.no_grad():
        error = nn.functional.linear(features, head.weight, head.bias) - logits
    return bool(error.norm() <= torch.finfo(logits.dtype).eps ** 0.5 * logits.norm())


def _shared(model: nn.Module, head: nn.Linear) -> bool:
    own = {id(parameter) for parameter in head.parameters()}
    holders = [m for m in model.modules() for p in m._parameters.values() if p is not None and id(p) in own]
    return any(holder is not head for holder in holders)
