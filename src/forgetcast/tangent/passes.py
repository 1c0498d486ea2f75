"""A surveyed model gone through chunk by chunk: one pass forward, then one backward for every number of a sample."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint, require_finite, require_integer
from forgetcast.modes import evaluating
from forgetcast.tangent.capture import Use, paths_to, recording, requiring
from forgetcast.tangent.fallback import Heads, gradients, looped, vectorised
from forgetcast.tangent.inputs import at, called, sample_count
from forgetcast.tangent.planner import chunk_size
from forgetcast.tangent.rules import Term
from forgetcast.tangent.survey import Survey, checked, layers_of, ruled, survey

Place = tuple[nn.Module, int]
"""A layer, and the how-manieth of its uses in a forward pass."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One chunk of samples after its forward pass.

    Attributes:
        places: of the samples.
        values: (n, c) the numbers that are differentiated.
        outputs: by use of a layer that a rule covers, where its output is in the graph, and how a gradient there is
            arranged to (n, T, channels).
        terms: by parameter, the term of every use.
        general: by parameter without a rule, the rows (n, c, p).
    """

    places: slice
    values: Float[Tensor, "n c"]
    outputs: Mapping[Place, tuple[Any, Callable[[Tensor], Tensor]]]
    terms: dict[str, dict[Place, Term]]
    general: dict[str, Tensor]

    def backward(self, c: int) -> dict[Place, Tensor]:
        """Gradient of number c at every layer's output, (n, T, channels); left out where it is zero everywhere."""
        found = gradients(self.values[:, c].sum(), [edge for edge, _ in self.outputs.values()])
        return {
            place: arrange(g)
            for (place, (_, arrange)), g in zip(self.outputs.items(), found, strict=True)
            if g is not None and (g[0].any() or g.any())  # one sample mostly tells, and is quickly read
        }


@dataclass(frozen=True, eq=False)
class Work:
    """A model made ready, and how it will be gone through.

    Attributes:
        model: in evaluation mode.
        inputs: all samples.
        parameters: by name.
        heads: the numbers to differentiate.
        survey: how each parameter's gradient is to be had.
        chunk: samples that go through the model together.
    """

    model: nn.Module
    inputs: Any
    parameters: dict[str, nn.Parameter]
    heads: Heads
    survey: Survey
    chunk: int

    @property
    def samples(self) -> int:
        """Number of samples n."""
        return sample_count(self.inputs)

    def passes(self) -> Iterator[Pass]:
        """Chunk after chunk; the graph of one is let go before the next."""
        for start in range(0, self.samples, self.chunk):
            yield self._pass(slice(start, min(start + self.chunk, self.samples)))

    def explicit(self, dtype: torch.dtype | None) -> tuple[Float[Tensor, "n c p"], Float[Tensor, "n c"]]:
        """The whole Jacobian and the numbers it belongs to."""
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        kind = dtype or common_type(self.parameters.values())
        shape = (self.samples, self.survey.outputs)
        device = next(iter(self.parameters.values())).device
        J = torch.zeros(*shape, sum(sizes), dtype=kind, device=device)
        values = torch.zeros(shape, dtype=kind, device=device)
        columns = dict(zip(self.parameters, torch.split(J, sizes, 2), strict=True))
        for part in self.passes():
            values[part.places] = part.values.detach().to(kind)
            for name, rows in part.general.items():
                columns[name][part.places] = rows.to(kind)
            for c in range(self.survey.outputs):
                g = part.backward(c)
                for name, terms in part.terms.items():
                    found = [term.rows(g[place]) for place, term in terms.items() if place in g]
                    if found:  # uses are added up before they are rounded to the type of the result
                        columns[name][part.places, c] = found[0] if len(found) == 1 else torch.stack(found).sum(0)
        require_finite("the Jacobian", J)
        return J, values

    def _pass(self, places: slice) -> Pass:
        inputs = at(self.inputs, places)
        n = sample_count(inputs)
        with recording(layers_of(self.survey.sites)) as uses:
            outputs = called(self.model, inputs)
            values = checked(self.heads(outputs, places), n)
        covered, looping = self._still_covered(values, uses, n)
        calls = self.survey.calls
        found = {
            (layer, k): (use.edge, partial(ruled(layer).tokens, axis=call.axis))
            for layer in layers_of(covered)
            for k, (use, call) in enumerate(zip(uses[layer], calls[layer], strict=True))
        }
        terms = {
            name: {
                (layer, k): ruled(layer).terms[attribute](layer, use.input(), call.axis)
                for layer, attribute in sites
                for k, (use, call) in enumerate(zip(uses[layer], calls[layer], strict=True))
            }
            for name, sites in covered.items()
        }
        general: dict[str, Tensor] = {}
        if self.survey.vectorised:
            chosen = {name: self.parameters[name] for name in self.survey.vectorised}
            general |= vectorised(self.model, inputs, chosen, outputs, lambda out: self.heads(out, places))
        if looping:
            chosen = {name: self.parameters[name] for name in looping}
            general |= looped(self.model, inputs, chosen, self.heads, places.start)
        return Pass(places, values, found, terms, general)

    def _still_covered(
        self, values: Tensor, uses: Mapping[nn.Module, list[Use]], n: int
    ) -> tuple[dict[str, Any], list[str]]:
        """Parameters whose rules fit this chunk, and those that it must loop for.

        A model may go another way for other samples: an expert that the surveyed ones did not meet, say.
        """
        readers, nodes = paths_to(values, self.parameters.values())
        covered, looping = {}, list(self.survey.looped)
        for name, parameter in self.parameters.items():
            if name in self.survey.unreached and readers[id(parameter)]:
                looping.append(name)
            if name not in self.survey.sites:
                continue
            layers = layers_of({name: self.survey.sites[name]})
            reached = sum(use.edge.node in nodes for layer in layers for use in uses[layer])
            alike = all(
                len(self.survey.calls[x]) == len(uses[x])
                and all(call.fits(use.shape, n) for call, use in zip(self.survey.calls[x], uses[x], strict=True))
                for x in layers
            )
            if alike and readers[id(parameter)] <= reached:
                covered[name] = self.survey.sites[name]
            else:
                looping.append(name)
        return covered, looping


@contextmanager
def prepared(
    model: nn.Module, inputs: Any, parameters: Mapping[str, nn.Parameter], heads: Heads, chunk: int | None
) -> Iterator[Work]:
    """The model in evaluation mode with only `parameters` requiring gradients, surveyed; restored afterwards."""
    if chunk is not None:
        require_integer("chunk", chunk, least=1)
    _require_own(model, parameters)
    n = sample_count(inputs)
    with evaluating(model), requiring(model, parameters.values()):
        found = survey(model, inputs, parameters, heads)
        yield Work(model, inputs, dict(parameters), heads, found, chunk or chunk_size(found.sample_bytes, n))


def common_type(parameters: Iterable[Tensor]) -> torch.dtype:
    """The type to which all parameters promote."""
    return reduce(torch.promote_types, (parameter.dtype for parameter in parameters))


def _require_own(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    own = dict(model.named_parameters(remove_duplicate=False))
    strangers = [name for name, parameter in parameters.items() if own.get(name) is not parameter]
    if strangers or not parameters:
        raise complaint(
            f"got parameters {strangers} that the model does not hold under these names" if strangers else "got none",
            "parameters of this very model, by their names in it",
            "Take them from `trainable(model)`.",
        )
