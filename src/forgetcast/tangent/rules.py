r"""From a layer's input x and the gradient g at its output to the gradient of its parameters, sample by sample.

    matrix   W x + b      dW_i = sum_t g_it x_it^T            Linear, Conv (x: patches), tokens t
    bias                  db_i = sum_t g_it
    scale    w * xhat     dw_i = sum_t g_it * xhat_it         LayerNorm, RMSNorm, GroupNorm, BatchNorm in evaluation
    lookup   W[x]         dW_i = sum_t e_{x_it} g_it^T        Embedding

All of them take g as (n, T, channels). In Gram form no gradient is built: with matrices, for instance,
`<dW_i, dW_j> = sum_ts (x_it . x_js) (g_it . g_js)`. A rule is chosen by the very function that a layer's `forward` is,
so that a subclass with a forward of its own has none and goes the general way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm


@runtime_checkable
class Term(Protocol):
    """What one use of one parameter contributes to its per-sample gradient, given g (n, T, channels)."""

    @property
    def inputs(self) -> int | None:
        """Width of what `gram` multiplies; None for a term without a Gram form."""
        ...

    @property
    def tokens(self) -> int:
        """T; 0 for a term that fits any."""
        ...

    def rows(self, g: Tensor) -> Float[Tensor, "n p"]:
        """Per-sample gradients, flattened as the parameter is."""
        ...

    def bound(self, g: Tensor) -> float:
        """What the norm of `rows` cannot exceed, the measure of its rounding error."""
        ...

    def at(self, places: slice) -> "Term":
        """Of the samples at `places`."""
        ...

    def joined(self, others: Sequence[Any]) -> "Term":
        """Of the samples of this term and of others of its kind, as long as the longest: zeros where one is shorter."""
        ...

    def gram(self, other: Any) -> Tensor | float:
        """(n, T, m, S) `a` with `<rows_i, rows_j> = sum_ts a_itjs <g_it, g_js>`."""
        ...


@dataclass(frozen=True, eq=False)
class Matrix:
    """Gradient of W in `W x`, a weight for each group of channels.

    Attributes:
        x: (n, groups, T, inputs).
        transposed: W is kept as (inputs, outputs).
    """

    x: Float[Tensor, "n groups T inputs"]
    transposed: bool = False

    @property
    def inputs(self) -> int | None:
        """Width of x; None for several groups."""
        return self.x.shape[-1] if self.x.shape[1] == 1 else None

    @property
    def tokens(self) -> int:
        """T."""
        return self.x.shape[2]

    def rows(self, g: Tensor) -> Float[Tensor, "n p"]:
        """`sum_t g_t x_t^T`. Cost: 2 n T inputs outputs."""
        n, groups, T, _ = self.x.shape
        y = g.reshape(n, T, groups, -1).transpose(1, 2)  # n groups T outputs
        left, right = (self.x, y) if self.transposed else (y, self.x)
        # products of tall matrices are several times faster with the narrow one in front
        narrow = left.shape[-1] <= right.shape[-1]
        return (left.mT @ right if narrow else (right.mT @ left).mT).flatten(1)

    def bound(self, g: Tensor) -> float:
        """`|x_i| |g_i|`, over all samples."""
        return _norms(self.x, g)

    def at(self, places: slice) -> "Matrix":
        """Of the samples at `places`."""
        return Matrix(self.x[places], self.transposed)

    def joined(self, others: Sequence["Matrix"]) -> "Matrix":
        """Of all samples."""
        return Matrix(_lengthened([self.x, *(other.x for other in others)], 2), self.transposed)

    def gram(self, other: "Matrix") -> Float[Tensor, "n T m S"]:
        """`x_it . x_js`. Cost: 2 n T m S inputs."""
        left, right = self.x[:, 0], other.x[:, 0]
        product = left.flatten(0, 1) @ right.flatten(0, 1).T
        return product.view(*left.shape[:2], *right.shape[:2])


@dataclass(frozen=True, eq=False)
class Bias:
    """Gradient of b in `x + b`."""

    @property
    def inputs(self) -> int:
        """Nothing is multiplied."""
        return 0

    @property
    def tokens(self) -> int:
        """Any."""
        return 0

    def rows(self, g: Tensor) -> Float[Tensor, "n p"]:
        """`sum_t g_t`."""
        return g.sum(1)

    def bound(self, g: Tensor) -> float:
        """`sqrt(T) |g|`."""
        return float(g.norm()) * sqrt(g.shape[1])

    def at(self, places: slice) -> "Bias":  # noqa: ARG002
        """Itself."""
        return self

    def joined(self, others: Sequence["Bias"]) -> "Bias":  # noqa: ARG002
        """Itself."""
        return self

    def gram(self, other: "Bias") -> float:  # noqa: ARG002
        """1."""
        return 1.0


@dataclass(frozen=True, eq=False)
class Scale:
    """Gradient of w in `w * x`; x is (n, T, channels)."""

    x: Float[Tensor, "n T channels"]

    @property
    def inputs(self) -> None:
        """No Gram form."""
        return

    @property
    def tokens(self) -> int:
        """T."""
        return self.x.shape[1]

    def rows(self, g: Tensor) -> Float[Tensor, "n p"]:
        """`sum_t g_t * x_t`."""
        return (g * self.x).sum(1)

    def bound(self, g: Tensor) -> float:
        """`|x_i| |g_i|`, over all samples."""
        return _norms(self.x, g)

    def at(self, places: slice) -> "Scale":
        """Of the samples at `places`."""
        return Scale(self.x[places])

    def joined(self, others: Sequence["Scale"]) -> "Scale":
        """Of all samples."""
        return Scale(_lengthened([self.x, *(other.x for other in others)], 1))

    def gram(self, other: "Scale") -> Tensor:
        """There is none: channels do not separate from tokens."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Lookup:
    """Gradient of W in `W[index]`.

    Attributes:
        index: (n, T).
        size: rows of W.
        padding: a row that is never trained.
    """

    index: Int[Tensor, "n T"]
    size: int
    padding: int | None

    @property
    def inputs(self) -> int:
        """Nothing is multiplied."""
        return 0

    def masked(self, g: Tensor) -> Tensor:
        """`g` without the places of the padding."""
        return g if self.padding is None else g.masked_fill((self.index == self.padding)[..., None], 0)

    @property
    def tokens(self) -> int:
        """T."""
        return self.index.shape[1]

    def rows(self, g: Tensor) -> Float[Tensor, "n p"]:
        """`sum_t e_index_t g_t^T`. Cost: n (T + size) channels."""
        n = len(self.index)
        place = self.index + self.size * torch.arange(n, device=g.device)[:, None]
        table = g.new_zeros(n * self.size, g.shape[-1])
        return table.index_add_(0, place.flatten(), self.masked(g).flatten(0, 1)).view(n, -1)

    def bound(self, g: Tensor) -> float:
        """`sqrt(T) |g|`."""
        return float(g.norm()) * sqrt(g.shape[1])

    def at(self, places: slice) -> "Lookup":
        """Of the samples at `places`."""
        return Lookup(self.index[places], self.size, self.padding)

    def joined(self, others: Sequence["Lookup"]) -> "Lookup":
        """Of all samples."""
        return Lookup(_lengthened([self.index, *(other.index for other in others)], 1), self.size, self.padding)

    def gram(self, other: "Lookup") -> Bool[Tensor, "n T m S"]:
        """1 where two places hold the same index that is not the padding."""
        same = self.index[:, :, None, None] == other.index
        if self.padding is not None:
            same &= (self.index != self.padding)[:, :, None, None]
        return same


@dataclass(frozen=True)
class Rule:
    """How one type of layer is read.

    Attributes:
        trailing: how many last axes of the output are its features; 0 where axis 1 holds the channels.
        terms: by attribute of the layer, what makes the term of its input `(layer, x, sample axis)`.
        ndim: axes of a batched output; None for any.
    """

    trailing: int
    terms: Mapping[str, Callable[[Any, Tensor, int], Term]]
    ndim: int | None = None

    def axes(self, shape: Sequence[int], samples: int) -> list[int]:
        """Axes of an output that may be the sample's."""
        if self.ndim not in (None, len(shape)):
            return []
        last = len(shape) - self.trailing if self.trailing else 1
        return [axis for axis in range(last) if shape[axis] == samples]

    def tokens(self, g: Tensor, axis: int) -> Shaped[Tensor, "n T channels"]:
        """A tensor shaped as the output, sample first, channels last."""
        return tokens(g, axis, self.trailing)


def tokens(values: Tensor, axis: int, trailing: int) -> Shaped[Tensor, "n T channels"]:
    """Sample first, features last, everything else between."""
    if trailing == 0:
        return values.flatten(2).mT if values.ndim > 2 else values[:, None]
    moved = values.movedim(axis, 0)
    return moved.reshape(len(moved), -1, prod(moved.shape[moved.ndim - trailing :]))


def padded(values: Tensor, axis: int, length: int) -> Tensor:
    """Zeros at the end of an axis that is shorter than `length`."""
    missing = length - values.shape[axis]
    return functional.pad(values, (0, 0) * (values.ndim - 1 - axis) + (0, missing)) if missing > 0 else values


def _lengthened(parts: Sequence[Tensor], axis: int) -> Tensor:
    longest = max(part.shape[axis] for part in parts)
    return torch.cat([padded(part, axis, longest) for part in parts])


def _norms(x: Tensor, g: Tensor) -> float:
    return float((x.flatten(1).norm(dim=1) * g.flatten(1).norm(dim=1)).norm())


def rule_for(layer: nn.Module) -> Rule | None:
    """The rule of a layer's own `forward`, or None where there is none."""
    if "forward" in vars(layer):
        return None
    forward = type(layer).forward
    name = f"{forward.__module__}.{forward.__qualname__}"
    if name.endswith("RMSNorm.forward") and not name.startswith("torch."):
        return Rule(1, {"weight": _root_mean_square})
    if name == "torch.nn.modules.sparse.Embedding.forward":
        plain = layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
        return Rule(1, {"weight": _lookup}) if plain else None
    if name in ("torch.nn.modules.normalization.LayerNorm.forward", "torch.nn.modules.normalization.RMSNorm.forward"):
        kind = _layer_norm if name.endswith("LayerNorm.forward") else _rms_norm
        trailing = len(layer.normalized_shape)  # type: ignore[arg-type]
        return Rule(trailing, {"weight": kind, "bias": _bias})
    return _RULES.get(name)


def _bias(_layer: Any, _x: Tensor, _axis: int) -> Term:
    return Bias()


def _linear(_: nn.Linear, x: Tensor, axis: int) -> Term:
    return Matrix(tokens(x, axis, 1)[:, None])


def _transposed(_: nn.Module, x: Tensor, axis: int) -> Term:
    return Matrix(tokens(x, axis, 1)[:, None], transposed=True)


def _lookup(layer: nn.Embedding, x: Tensor, axis: int) -> Term:
    return Lookup(tokens(x[..., None], axis, 1)[..., 0].long(), layer.num_embeddings, layer.padding_idx)


def _layer_norm(layer: nn.LayerNorm, x: Tensor, axis: int) -> Term:
    unit = functional.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    return Scale(tokens(unit, axis, len(layer.normalized_shape)))


def _rms_norm(layer: nn.RMSNorm, x: Tensor, axis: int) -> Term:
    unit = functional.rms_norm(x, list(layer.normalized_shape), None, layer.eps)
    return Scale(tokens(unit, axis, len(layer.normalized_shape)))


def _root_mean_square(layer: Any, x: Tensor, axis: int) -> Term:
    epsilon = getattr(layer, "variance_epsilon", getattr(layer, "eps", 0.0))
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return Scale(tokens(unit, axis, 1))


def _group_norm(layer: nn.GroupNorm, x: Tensor, axis: int) -> Term:
    return Scale(tokens(functional.group_norm(x, layer.num_groups, None, None, layer.eps), axis, 0))


def _batch_norm(layer: _BatchNorm, x: Tensor, axis: int) -> Term:
    unit = functional.batch_norm(x, layer.running_mean, layer.running_var, None, None, False, 0.0, layer.eps)
    return Scale(tokens(unit, axis, 0))


def _convolution(layer: Any, x: Tensor, _: int) -> Term:
    """Patches (n, groups, places, channels of a group x kernel), in the order of the weight."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, step, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2):
        x = x.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
    dims = len(layer.kernel_size)
    n, channels = x.shape[:2]
    x = x.reshape(n, layer.groups, channels // layer.groups, *x.shape[2:])
    order = [0, 1, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
    places = prod(x.shape[3 : 3 + dims])
    return Matrix(x.permute(order).reshape(n, layer.groups, places, -1))


_CHANNELS = {"weight": _convolution, "bias": _bias}
_RULES = {
    "torch.nn.modules.linear.Linear.forward": Rule(1, {"weight": _linear, "bias": _bias}),
    "transformers.pytorch_utils.Conv1D.forward": Rule(1, {"weight": _transposed, "bias": _bias}),
    "torch.nn.modules.conv.Conv1d.forward": Rule(0, _CHANNELS, ndim=3),
    "torch.nn.modules.conv.Conv2d.forward": Rule(0, _CHANNELS, ndim=4),
    "torch.nn.modules.conv.Conv3d.forward": Rule(0, _CHANNELS, ndim=5),
    "torch.nn.modules.normalization.GroupNorm.forward": Rule(0, {"weight": _group_norm, "bias": _bias}),
    "torch.nn.modules.batchnorm._BatchNorm.forward": Rule(0, {"weight": _batch_norm, "bias": _bias}),
}
