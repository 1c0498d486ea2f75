r"""Before the work, two samples decide how each parameter's gradient is to be had, and prove that way on them.

Every parameter goes one of four ways: a rule at each layer that uses it, a vectorised pass, a loop over samples, or
nothing where the outputs do not depend on it. A rule is taken only where it covers every place at which the graph reads
the parameter, and where it gives what plain autograd gives for two samples.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm

from forgetcast.checks import complaint, require_finite
from forgetcast.tangent.capture import Use, paths_to, recording
from forgetcast.tangent.fallback import Heads, gradients, vectorised
from forgetcast.tangent.inputs import at, called, sample_count
from forgetcast.tangent.planner import LayerSize
from forgetcast.tangent.rules import Rule, Term, rule_for

Site = tuple[nn.Module, str]
"""A layer that uses a parameter, and the attribute under which it holds it."""


@dataclass(frozen=True)
class Call:
    """One use of a layer in a forward pass: how many axes its output has, and which of them is the sample's.

    The layer itself fixes the axes of its features; what is left is as long as a batch's texts or images are.
    """

    axis: int
    axes: int

    def fits(self, shape: Sequence[int], samples: int) -> bool:
        """Whether an output of this shape holds so many samples on that axis."""
        return len(shape) == self.axes and shape[self.axis] == samples


@dataclass(frozen=True, eq=False)
class Survey:
    """What two samples told.

    Attributes:
        outputs: c, the numbers a sample.
        sites: of each parameter that rules cover, the layers (and their attribute) that use it.
        calls: of each such layer, its uses in a forward pass.
        sizes: of each parameter that rules cover, what its part of a kernel depends on.
        vectorised: parameters that take a pass under `vmap`.
        looped: parameters that take a loop over samples.
        unreached: parameters on which the outputs do not depend.
        sample_bytes: what a forward pass keeps for the backward pass, a sample.
    """

    outputs: int
    sites: dict[str, tuple[Site, ...]]
    calls: dict[nn.Module, tuple[Call, ...]]
    sizes: dict[str, LayerSize]
    vectorised: tuple[str, ...]
    looped: tuple[str, ...]
    unreached: tuple[str, ...]
    sample_bytes: int


def owners(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, list[Site]]:
    """Every module that holds each parameter, with the attribute."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, list[Site]] = {name: [] for name in parameters}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in names:
                found[names[id(parameter)]].append((module, attribute))
    return found


def survey(model: nn.Module, inputs: Any, parameters: Mapping[str, nn.Parameter], heads: Heads) -> Survey:
    """Look at the first two samples (one, if there is no second).

    Args:
        model: in evaluation mode, only `parameters` requiring gradients.
        inputs: all samples.
        parameters: those asked for.
        heads: the numbers to differentiate.

    Raises:
        ValueError: numbers of a wrong shape, or that depend on none of the parameters; samples that depend on each
            other.

    Cost: one forward pass and two backward passes of two samples, one forward pass of one; for parameters
    without a rule one try of the vectorised way.
    """
    trial = _try(model, at(inputs, slice(0, 2)), parameters, heads)
    sites: dict[str, tuple[Site, ...]] = {}
    sizes: dict[str, LayerSize] = {}
    groups: dict[tuple[nn.Module, ...], int] = {}
    others, unreached = [], []
    for name, parameter in parameters.items():
        if trial.readers[id(parameter)] == 0:
            unreached.append(name)
        elif (terms := _terms(name, parameter, trial)) and _agree(terms, parameter, trial.truth[name]):
            sites[name] = tuple(trial.held[name])
            layers = tuple(layer for layer, _ in sites[name])
            sizes[name] = _size(terms, parameter, groups.setdefault(layers, len(groups)))
        else:
            others.append(name)
    vectorised = _where_vmap_agrees(model, trial, {name: parameters[name] for name in others}, heads)
    return Survey(
        outputs=trial.values.shape[1],
        sites=sites,
        calls={layer: tuple(call for call in trial.calls[layer] if call) for layer in layers_of(sites)},
        sizes=sizes,
        vectorised=vectorised,
        looped=tuple(name for name in others if name not in vectorised),
        unreached=tuple(unreached),
        sample_bytes=trial.sample_bytes,
    )


def layers_of(sites: Mapping[str, Sequence[Site]]) -> list[nn.Module]:
    """Every layer at a site, once."""
    return list(dict.fromkeys(layer for places in sites.values() for layer, _ in places))


def ruled(layer: nn.Module) -> Rule:
    """The rule of a layer that is known to have one."""
    rule = rule_for(layer)
    assert rule is not None
    return rule


def checked(values: Any, n: int) -> Float[Tensor, "n c"]:
    """The numbers to differentiate, if they are (n, c) and finite."""
    if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != n or not values.is_floating_point():
        kind = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise complaint(
            f"got {kind} to differentiate, for {n} samples",
            f"a floating-point tensor with {n} rows, one for each sample",
            "Pick that tensor from what the model returns.",
        )
    require_finite("what is differentiated", values.detach())
    return values


@dataclass(frozen=True, eq=False)
class _Trial:
    """Two samples, forwards and backwards by plain autograd."""

    inputs: Any
    outputs: Any
    values: Tensor
    weights: Tensor  # (c,): what is differentiated is values @ weights
    held: dict[str, list[Site]]
    readers: dict[int, int]
    nodes: set[Any]
    uses: dict[nn.Module, list[Use]]
    calls: dict[nn.Module, list[Call | None]]
    arrived: dict[nn.Module, list[Tensor]]  # gradient at every use, of all samples
    truth: dict[str, Tensor]  # (samples, p)
    sample_bytes: int


def _try(model: nn.Module, inputs: Any, parameters: Mapping[str, nn.Parameter], heads: Heads) -> _Trial:
    n = sample_count(inputs)
    held = owners(model, parameters)
    layers = [layer for layer in layers_of(held) if rule_for(layer) is not None]
    memory = _Memory(parameters.values())
    with recording(layers) as uses, saved_tensors_hooks(memory.pack, memory.unpack):
        outputs = called(model, inputs)
        values = checked(heads(outputs, slice(0, n)), n)
    _require_independent(model, inputs, values, heads)
    if not values.requires_grad:
        raise complaint(
            f"numbers to differentiate that depend on none of the {len(parameters)} parameters",
            "at least one that they depend on",
            "Choose others, or let the model and what picks the numbers go without `no_grad` and `detach`.",
        )
    weights = torch.randn(values.shape[1], generator=torch.Generator().manual_seed(0)).to(values)
    mixed = values @ weights
    readers, nodes = paths_to(mixed, parameters.values())
    places = [*parameters.values(), *(use.edge for parts in uses.values() for use in parts)]
    found = [gradients(mixed[i], places) for i in range(n)]
    columns = iter(list(zip(*found, strict=True)))
    truth = {
        name: torch.stack([torch.zeros_like(p) if g is None else g for g in next(columns)]).reshape(n, -1)
        for name, p in parameters.items()
    }
    calls: dict[nn.Module, list[Call | None]] = {layer: [] for layer in uses}
    arrived: dict[nn.Module, list[Tensor]] = {layer: [] for layer in uses}
    for layer, parts in uses.items():
        for use in parts:
            each = [values.new_zeros(use.shape) if g is None else g for g in next(columns)]
            calls[layer].append(_call(ruled(layer), use, each))
            arrived[layer].append(torch.stack(each).sum(0))
    return _Trial(
        inputs, outputs, values, weights, held, readers, nodes, uses, calls, arrived, truth, memory.bytes // n
    )


def _call(rule: Rule, use: Use, each: Sequence[Tensor]) -> Call | None:
    """The axis along which a sample's gradient stays on the sample's own place, if there is one."""
    for axis in rule.axes(use.shape, len(each)):
        strangers = (g.movedim(axis, 0)[[j for j in range(len(each)) if j != i]] for i, g in enumerate(each))
        if not any(bool(part.any()) for part in strangers):
            return Call(axis, len(use.shape))
    return None


def _terms(name: str, parameter: nn.Parameter, trial: _Trial) -> list[tuple[Term, Tensor]]:
    """The term and the gradient (samples, T, channels) of every use, if rules see all of them; else nothing."""
    found: list[tuple[Term, Tensor]] = []
    reached = 0
    for layer, attribute in trial.held[name]:
        rule = rule_for(layer)
        if rule is None or attribute not in rule.terms:
            return []
        for use, call, gradient in zip(trial.uses[layer], trial.calls[layer], trial.arrived[layer], strict=True):
            if call is None:
                return []
            found.append((rule.terms[attribute](layer, use.input(), call.axis), rule.tokens(gradient, call.axis)))
            reached += use.edge.node in trial.nodes
    return found if trial.readers[id(parameter)] <= reached else []


def _agree(terms: Sequence[tuple[Term, Tensor]], parameter: nn.Parameter, truth: Tensor) -> bool:
    """Whether the terms add up to what autograd gives, up to rounding."""
    error = (sum(term.rows(g) for term, g in terms) - truth).norm()
    bound = sum(term.bound(g) for term, g in terms)
    return bool(error <= torch.finfo(parameter.dtype).eps ** 0.5 * bound)


def _size(terms: Sequence[tuple[Term, Tensor]], parameter: nn.Parameter, layer: int) -> LayerSize:
    kinds = {(type(term), term.inputs, g.shape[2]) for term, g in terms}
    (_, inputs, outputs) = next(iter(kinds))
    tokens = sum(g.shape[1] for _, g in terms)
    return LayerSize(parameter.numel(), tokens, inputs if len(kinds) == 1 else None, outputs, layer)


def _where_vmap_agrees(
    model: nn.Module, trial: _Trial, parameters: Mapping[str, nn.Parameter], heads: Heads
) -> tuple[str, ...]:
    """Parameters whose gradients come out right from one pass under `vmap`."""
    if not parameters:
        return ()
    n = len(trial.values)
    try:
        rows = vectorised(model, trial.inputs, parameters, trial.outputs, lambda out: heads(out, slice(0, n)))
    except Exception:  # any module's own code runs here, and the loop is right without vmap
        return ()
    whole = torch.stack([truth.norm() for truth in trial.truth.values()]).norm()
    agreeing = []
    for name, parameter in parameters.items():
        error = (rows[name].mT @ trial.weights - trial.truth[name]).norm()
        scale = torch.maximum(trial.truth[name].norm(), 1e-2 * whole)
        if error <= torch.finfo(parameter.dtype).eps ** 0.5 * scale:
            agreeing.append(name)
    return tuple(agreeing)


def _require_independent(model: nn.Module, inputs: Any, values: Tensor, heads: Heads) -> None:
    """Raise if the first sample's numbers change when it comes alone."""
    remedy = "Let BatchNorm track running statistics, and take statistics over samples out of the model."
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise complaint(f"{name}, a {type(module).__name__} over the batch", "no statistics over samples", remedy)
    if len(values) == 1:
        return
    with torch.no_grad():
        found = called(model, at(inputs, slice(0, 1)))
        alone, together = heads(found, slice(0, 1))[0], values[0]
        change, eps = float((alone - together).norm()), torch.finfo(values.dtype).eps
        # outputs may cancel each other in what heads make of them: what is left is rounding
        if change > eps**0.25 * float(together.norm()) + eps**0.5 * _size_of_outputs(found):
            raise complaint(
                f"a model whose outputs for a sample change by {change:.3g} when the sample comes alone",
                "outputs of a sample that do not depend on the other samples of its batch",
                remedy,
            )


class _Memory:
    """Counts what autograd keeps for the backward pass, weights apart."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self.seen:
            self.seen.add(place)
            self.bytes += tensor.nbytes
        return tensor

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        return tensor


def _size_of_outputs(found: Any) -> float:
    """Norm of the largest tensor among a model's outputs."""
    parts = found.values() if isinstance(found, Mapping) else found if isinstance(found, tuple) else (found,)
    return max((float(part.norm()) for part in parts if isinstance(part, Tensor)), default=0.0)
