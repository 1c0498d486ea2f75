r"""Tangent kernels of two sets of samples, from one pass through the model for each.

    K[i, c, j, d] = sum_p J[i, c, p] J[j, d, p]

The Jacobian is not built where the planner finds the Gram form of a layer cheaper. There is no kernel of the sum of all
outputs here: for a softmax head trained from zero it is zero everywhere, since the class rows keep summing to zero.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint, require_finite, require_integer
from forgetcast.tangent.gram import Side, block, collect
from forgetcast.tangent.inputs import sample_count
from forgetcast.tangent.jacobian import heads_of, trainable
from forgetcast.tangent.passes import Work, prepared
from forgetcast.tangent.planner import Plan, plan, require_memory

MEMORY = 2**33
"""Bytes that a kernel's parts may take by default: 8 GiB."""

EXACT = 16
"""Up to that many outputs the trace kernel takes them all, and no random probes."""


@dataclass(frozen=True, eq=False)
class KernelBlocks:
    """Blocks of a kernel over the samples of a and b, float64.

    Attributes:
        aa: a with a: (n, c, n, c) for the full kernel, (n, n) for the trace kernel.
        ab: a with b, (n, c, m, c) or (n, m); None where there is no b.
        bb: b with b; None where there is no b.
        plan: how each layer was computed, and at what cost.
        zero: parameters whose gradients are zero for every sample, such as LoRA's first factor while the second is 0.
    """

    aa: Tensor
    ab: Tensor | None
    bb: Tensor | None
    plan: Plan
    zero: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class KroneckerKernel:
    """`K[i, c, j, d] = samples[i, j] classes[c, d]`, kept as its two factors.

    Attributes:
        samples: (n, m).
        classes: (C, C).
    """

    samples: Float[Tensor, "n m"]
    classes: Float[Tensor, "C C"]

    def dense(self) -> Float[Tensor, "n C m C"]:
        """The product written out."""
        return torch.einsum("ij,cd->icjd", self.samples, self.classes)

    def __matmul__(self, values: Float[Tensor, "m C"]) -> Float[Tensor, "n C"]:
        """`sum_jd K[i, c, j, d] values[j, d]`. Cost: n m C + n C^2."""
        return self.samples @ values @ self.classes.T


def tangent_kernel(
    model: nn.Module,
    a: Any,
    b: Any = None,
    *,
    parameters: Mapping[str, nn.Parameter] | None = None,
    outputs: Callable[[Any], Tensor] | None = None,
    chunk: int | None = None,
    memory: float = MEMORY,
) -> KernelBlocks:
    r"""The tangent kernel of `parameters`, exactly.

        K[i, c, j, d] = <d f_c(x_i) / d theta, d f_d(x_j) / d theta>

    Args:
        model: as for `jacobian`.
        a: samples; nested as for `jacobian`.
        b: more samples, for the blocks ab and bb.
        parameters: from `trainable`; None for all that require gradients.
        outputs: from what the model returns to (samples, c); by default the tensor itself, or its `logits`.
        chunk: samples that go through the model together.
        memory: bytes that may be kept.

    Raises:
        ValueError: as for `jacobian`; or more than `memory` bytes would be kept.

    Cost: 1 + 1.1 c passes forward for every sample with frozen weights, and the products in the plan.
    """
    return _kernel(model, a, b, parameters, _Heads(heads_of(outputs)), chunk, memory, trace=False)


def trace_kernel(
    model: nn.Module,
    a: Any,
    b: Any = None,
    *,
    parameters: Mapping[str, nn.Parameter] | None = None,
    outputs: Callable[[Any], Tensor] | None = None,
    probes: int | None = None,
    seed: int = 0,
    chunk: int | None = None,
    memory: float = MEMORY,
) -> KernelBlocks:
    r"""The tangent kernel's mean over outputs, one number a pair of samples.

        k[i, j] = 1/C sum_c K[i, c, j, c] = E_v <J_i^T v, J_j^T v>,      v a random unit vector

    Args:
        model: as for `tangent_kernel`.
        a: as for `tangent_kernel`.
        b: as for `tangent_kernel`.
        parameters: as for `tangent_kernel`.
        outputs: as for `tangent_kernel`.
        probes: random unit vectors, the same ones for every sample; None takes all outputs exactly up to 16 of them,
            and 16 probes beyond. 4 / 16 / 64 probes gave an error of about 30 / 13 / 3 %.
        seed: of the probes.
        chunk: as for `tangent_kernel`.
        memory: as for `tangent_kernel`.

    Raises:
        ValueError: as for `tangent_kernel`.

    Cost: 1 + 1.1 probes passes forward for every sample.
    """
    if probes is not None:
        require_integer("probes", probes, least=1)
    return _kernel(
        model, a, b, parameters, _Heads(heads_of(outputs), probes, seed, probing=True), chunk, memory, trace=True
    )


def grouped_trace_kernels(
    model: nn.Module,
    samples: Any,
    groups: Mapping[str, Mapping[str, nn.Parameter]],
    *,
    outputs: Callable[[Any], Tensor] | None = None,
    probes: int | None = None,
    seed: int = 0,
    chunk: int | None = None,
    memory: float = MEMORY,
) -> dict[str, Float[Tensor, "n n"]]:
    """The trace kernel of each of several groups of parameters; that of all together is their sum.

    Args:
        model: as for `tangent_kernel`.
        samples: as a of `tangent_kernel`.
        groups: by a name of yours, parameters by their names in the model; in one group each.
        outputs: as for `tangent_kernel`.
        probes: as for `trace_kernel`.
        seed: of the probes.
        chunk: as for `tangent_kernel`.
        memory: as for `tangent_kernel`.

    Raises:
        ValueError: as for `tangent_kernel`.

    Cost: that of one `trace_kernel` of all of them.
    """
    parameters = {name: parameter for group in groups.values() for name, parameter in group.items()}
    heads = _Heads(heads_of(outputs), probes, seed, probing=True)
    (side,), planned = _collected(model, [samples], parameters, heads, chunk, memory, trace=True)
    device = next(iter(parameters.values())).device
    return {name: _block(side, side, planned, set(group), device, trace=True) for name, group in groups.items()}


def joint_kernel(
    model: nn.Module,
    sets: Sequence[Any],
    *,
    trace: bool = False,
    parameters: Mapping[str, nn.Parameter] | None = None,
    outputs: Callable[[Any], Tensor] | None = None,
    probes: int | None = None,
    seed: int = 0,
    chunk: int | None = None,
    memory: float = MEMORY,
) -> list[list[Tensor]]:
    """The tangent kernel of several sets of samples: row s holds its blocks of set s with the sets from s on.

    Args:
        model: as for `tangent_kernel`.
        sets: samples of each set, as a of `tangent_kernel`.
        trace: the trace kernel, blocks (n, m); else the full one, blocks (n, c, m, c).
        parameters: as for `tangent_kernel`.
        outputs: as for `tangent_kernel`.
        probes: as for `trace_kernel`; for the trace kernel only.
        seed: of the probes.
        chunk: as for `tangent_kernel`.
        memory: as for `tangent_kernel`.

    Raises:
        ValueError: as for `tangent_kernel`; no set; probes for the full kernel.

    Cost: that of one `tangent_kernel` or `trace_kernel` of all samples.
    """
    if not sets:
        raise complaint("a kernel of no sets", "at least one set of samples", "Give the samples of each set.")
    if probes is not None:
        require_integer("probes", probes, least=1)
        if not trace:
            raise complaint(f"got probes={probes} for the full kernel", "trace=True beside them", "Leave probes=None.")
    parameters = trainable(model) if parameters is None else parameters
    heads = _Heads(heads_of(outputs), probes, seed, probing=trace)
    sides, planned = _collected(model, sets, parameters, heads, chunk, memory, trace=trace)
    device = next(iter(parameters.values())).device
    return [[_block(x, y, planned, None, device, trace=trace) for y in sides[s:]] for s, x in enumerate(sides)]


def kronecker_kernel(
    model: nn.Module,
    a: Any,
    b: Any,
    weight: Float[Tensor, "C d"],
    *,
    parameters: Mapping[str, nn.Parameter] | None = None,
    features: Callable[[Any], Tensor],
    probes: int = 16,
    seed: int = 0,
    chunk: int | None = None,
    memory: float = MEMORY,
) -> KroneckerKernel:
    r"""A stand-in for the block ab of a network with a linear head: the feature kernel times the head's class geometry.

        K[i, c, j, d]  ~  q[i, j] (W W^T)[c, d],      q = the trace kernel of the features

    Exact where the features' own kernel is q[i, j] I; else an approximation whose error must be measured: 14 % where
    the trace kernel times the identity had 57 %, on one random network.

    Args:
        model: as for `tangent_kernel`.
        a: as for `tangent_kernel`.
        b: as for `tangent_kernel`; None for a with itself.
        weight: W, rows by class.
        parameters: of the feature extractor; the head's own part of the kernel is not in here.
        features: from what the model returns to (samples, d).
        probes: random directions in the space of features.
        seed: of the probes.
        chunk: as for `tangent_kernel`.
        memory: as for `tangent_kernel`.

    Raises:
        ValueError: as for `tangent_kernel`; features whose width is not that of `weight`.

    Cost: 1 + 1.1 probes passes forward for every sample, whatever the number of classes.
    """

    def fitting(found: Any) -> Tensor:
        phi = features(found)
        if phi.shape[-1] != weight.shape[1]:
            raise complaint(
                f"got features {tuple(phi.shape)} and a weight {tuple(weight.shape)}",
                "a weight with one column for each feature",
                "Give what the head multiplies, and the head's weight (classes, features).",
            )
        return phi

    found = trace_kernel(
        model, a, b, parameters=parameters, outputs=fitting, probes=probes, seed=seed, chunk=chunk, memory=memory
    )
    wide = weight.detach().double()
    return KroneckerKernel(found.aa if found.ab is None else found.ab, wide @ wide.T)


@dataclass(eq=False)
class _Heads:
    """The numbers to differentiate: the outputs, or their products with `probes` unit vectors drawn once."""

    outputs: Callable[[Any, slice], Tensor]
    probes: int | None = None
    seed: int = 0
    probing: bool = False
    vectors: Tensor | None = None

    def __call__(self, found: Any, places: slice) -> Tensor:
        values = self.outputs(found, places)
        if not self.probing or not isinstance(values, Tensor) or values.ndim != 2:
            return values
        if self.vectors is None:
            self.vectors = self._draw(values.shape[1])
        return values @ self.vectors.to(values) if self.vectors.numel() else values

    def _draw(self, outputs: int) -> Tensor:
        if self.probes is None and outputs <= EXACT:
            return torch.zeros(outputs, 0)
        generator = torch.Generator().manual_seed(self.seed)
        vectors = torch.randn(outputs, self.probes or EXACT, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(vectors, dim=0)


def _kernel(
    model: nn.Module,
    a: Any,
    b: Any,
    parameters: Mapping[str, nn.Parameter] | None,
    heads: _Heads,
    chunk: int | None,
    memory: float,
    *,
    trace: bool,
) -> KernelBlocks:
    sets = [a] if b is None else [a, b]
    parameters = trainable(model) if parameters is None else parameters
    sides, planned = _collected(model, sets, parameters, heads, chunk, memory, trace=trace)
    device = next(iter(parameters.values())).device
    found = [_block(x, y, planned, None, device, trace=trace) for k, x in enumerate(sides) for y in sides[k:]]
    zero = tuple(name for name in parameters if not any(name in side.rows or side.places(name) for side in sides))
    aa, ab, bb = found if b is not None else (found[0], None, None)
    return KernelBlocks(aa, ab, bb, planned, zero)


def _collected(
    model: nn.Module,
    sets: Sequence[Any],
    parameters: Mapping[str, nn.Parameter],
    heads: _Heads,
    chunk: int | None,
    memory: float,
    *,
    trace: bool,
) -> tuple[list[Side], Plan]:
    """What each set contributes, and how the blocks are to be computed."""
    with prepared(model, sets[0], parameters, heads, chunk) as work:
        planned = plan(
            work.survey.sizes,
            {name: parameters[name].numel() for name in (*work.survey.vectorised, *work.survey.looped)},
            samples=[sample_count(part) for part in sets],
            outputs=work.survey.outputs,
            chunk=work.chunk,
            looped=work.survey.looped,
            trace=trace,
            itemsize=next(iter(parameters.values())).element_size(),
        )
        require_memory(planned, memory)
        sides = [collect(Work(model, part, work.parameters, heads, work.survey, work.chunk), planned) for part in sets]
    return sides, planned


def _block(
    x: Side, y: Side, planned: Plan, names: Collection[str] | None, device: torch.device, *, trace: bool
) -> Tensor:
    found = block(x, y, planned, names, trace=trace, device=device)
    require_finite("the kernel", found)
    return found[:, 0, :, 0] / planned.outputs if trace else found
