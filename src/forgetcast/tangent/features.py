"""Frozen features and their targets, given as arrays or as a stream of blocks, and checked either way."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from forgetcast.checks import complaint, require_finite, require_integer

Block = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class Features:
    """Features of one task, `phi` (n, d), and their targets `y`: (n,) class labels or (n, C) values.

    Three ways to give them:

    * two arrays: numpy (memory-mapped too) or torch, `Features(phi, y)`; `y` may be left out where no target is needed;
    * a stream that can be read again: a `DataLoader`, a list, or a function that returns an iterator, of pairs
      `(phi_block, y_block)`: `Features(loader)`;
    * a generator of such pairs, which is read once.

    Arrays are checked at once and shared, not copied; streams are checked block by block as they are read.

    Args:
        phi: the features, float16, bfloat16, float32 or float64; the first two are computed with in float32.
        y: the targets, when `phi` is an array.
        block_rows: rows of an array that are worked on together (memory: `4 * block_rows * d` bytes).
        name: what error messages call these features.

    Raises:
        ValueError: no samples, NaN or infinity, a shape or type that does not fit, samples that are all equal.

    Examples:
        >>> import numpy as np
        >>> features = Features(np.eye(4, dtype=np.float32), np.array([0, 1, 0, 1]))
        >>> features.rows, features.width
        (4, 4)
    """

    phi: Any
    y: Any = None
    block_rows: int = 16384
    name: str = "features"
    _spent: list[bool] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        require_integer("block_rows", self.block_rows, least=1)
        if not self.is_array:
            if self.y is not None:
                raise complaint(
                    f"{self.name}: got targets of type {type(self.y).__name__} beside a stream of type "
                    f"{type(self.phi).__name__}",
                    "a stream of (phi_block, y_block) pairs and y=None",
                    "Let the stream yield the targets, or give phi as an array.",
                )
            if not callable(self.phi) and not isinstance(self.phi, Iterable):
                raise complaint(
                    f"{self.name}: got {type(self.phi).__name__}",
                    "an array (n, d), a DataLoader, a generator or a function that returns an iterator",
                    "Extract the features first.",
                )
            return
        object.__setattr__(self, "phi", _tensor(self.phi))
        object.__setattr__(self, "y", None if self.y is None else _tensor(self.y))
        _check_block(self.name, self.phi, self.y, 0)
        if not _varies(self.phi, self.phi[0]):
            raise _no_variance(self.name, len(self.phi))

    @property
    def is_array(self) -> bool:
        """Whether the features are an array rather than a stream."""
        return isinstance(self.phi, Tensor | np.ndarray)

    @property
    def read_once(self) -> bool:
        """Whether the stream is a generator, which can be read only once."""
        return not self.is_array and isinstance(self.phi, Iterator)

    @property
    def shuffled(self) -> bool:
        """Whether the stream is a `DataLoader` that draws a new order at every pass."""
        return isinstance(getattr(self.phi, "sampler", None), RandomSampler)

    @property
    def rows(self) -> int | None:
        """Number of samples n; None for a stream, whose length is known only after reading."""
        return len(self.phi) if self.is_array else None

    @property
    def width(self) -> int | None:
        """Feature width d; None for a stream."""
        return int(self.phi.shape[1]) if self.is_array else None

    def blocks(self) -> Iterator[Block]:
        """Checked blocks `(phi (b, d) float32 or float64, y (b,) or (b, C) or None)` in order."""
        if self.is_array:
            for start in range(0, len(self.phi), self.block_rows):
                part = slice(start, start + self.block_rows)
                yield _computable(self.phi[part]), None if self.y is None else self.y[part]
            return
        yield from self._stream()

    def _stream(self) -> Iterator[Block]:
        if self.read_once:
            if self._spent:
                raise complaint(
                    f"{self.name}: a {type(self.phi).__name__} that has been read already",
                    "a stream that can be read again",
                    "Give the function that makes the generator (not its result), a DataLoader or an array.",
                )
            self._spent.append(True)
        rows, varies, labelled = 0, False, False
        first: Tensor | None = None
        for pair in self.phi() if isinstance(self.phi, Callable) else self.phi:  # type: ignore[arg-type]
            phi, y = self._pair(pair)
            _check_block(self.name, phi, y, rows)
            first = phi[0].clone() if first is None else first
            if phi.shape[1] != len(first):
                raise complaint(
                    f"{self.name}: a block of shape {tuple(phi.shape)} after blocks of width {len(first)}",
                    f"width {len(first)} throughout",
                    "Use one backbone and one layer for all features.",
                )
            if rows > 0 and (y is not None) != labelled:
                raise complaint(
                    f"{self.name}: a block with{'out' if y is None else ''} targets after blocks "
                    f"with{'' if y is None else 'out'}",
                    "targets in all blocks or in none",
                    "Yield (features, None) throughout where targets are not known.",
                )
            labelled = y is not None
            varies = varies or _varies(phi, first)
            rows += len(phi)
            yield _computable(phi), y
        if rows == 0:
            raise _empty(self.name)
        if not varies:
            raise _no_variance(self.name, rows)

    def _pair(self, pair: Any) -> Block:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise complaint(
                f"{self.name}: the stream yielded a {type(pair).__name__}",
                "pairs (phi_block, y_block)",
                "Yield (features, targets); targets may be None where none are needed.",
            )
        return _tensor(pair[0]), None if pair[1] is None else _tensor(pair[1])

    def gather(self) -> Block:
        """All samples in memory at once: `(phi (n, d), y)`."""
        if self.is_array:
            return _computable(self.phi), self.y
        blocks = list(self.blocks())
        targets = [y for _, y in blocks if y is not None]
        return torch.cat([phi for phi, _ in blocks]), torch.cat(targets) if targets else None


def target_matrix(name: str, y: Tensor | None, outputs: int, like: Tensor) -> Tensor:
    """Targets as a matrix (b, C) of the type and device of `like`: one-hot rows for labels, values as they are."""
    y = check_targets(name, y, outputs)
    if y.ndim == 2:
        return y.to(like)
    return torch.zeros(len(y), outputs, dtype=like.dtype, device=like.device).scatter_(1, y.to(like.device)[:, None], 1)


def check_targets(name: str, y: Tensor | None, outputs: int) -> Tensor:
    """The targets, if they fit a head of `outputs` columns: labels in [0, C) as int64, or values (b, C).

    Raises:
        ValueError: no targets, a label out of range or not a whole number, values of another width.
    """
    if y is None:
        raise complaint(f"{name}: no targets", "labels (n,) or values (n, C)", "Give y beside the features.")
    if y.ndim == 2:
        if y.shape[1] != outputs:
            raise complaint(
                f"{name}: targets of shape {tuple(y.shape)} for a head of {outputs} outputs",
                f"targets (n, {outputs})",
                "Grow the head (LinearHead.grow) or correct the targets.",
            )
        return y
    if y.ndim != 1 or (y.is_floating_point() and bool((y != y.round()).any())):
        raise complaint(
            f"{name}: {y.dtype} targets of shape {tuple(y.shape)} that are no labels",
            f"labels (n,), whole numbers in 0 .. {outputs - 1}, or values (n, {outputs})",
            "Give class numbers, or one value for each output.",
        )
    y = y.long()
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= outputs:
        raise complaint(
            f"{name}: label {low if low < 0 else high} for a head of {outputs} outputs",
            f"labels in 0 .. {outputs - 1}",
            "Grow the head for new classes first: head.grow(number_of_classes), or renumber the labels from 0.",
        )
    return y


def check_labels(name: str, y: Tensor | None, outputs: int) -> Tensor:
    """The labels (n,) in [0, C), of which accuracy is a share.

    Raises:
        ValueError: no targets, a label out of range, real-valued targets.
    """
    y = check_targets(name, y, outputs)
    if y.ndim != 1:
        raise complaint(
            f"{name}: targets of shape {tuple(y.shape)}",
            "integer labels (n,), of which accuracy is a share",
            "Give labels, or ask for drift and squared error only.",
        )
    return y


def _tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    with warnings.catch_warnings():  # torch warns of read-only memory maps; nothing here writes into features
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        values = np.asarray(array)
        if any(stride < 0 for stride in values.strides):  # a reversed view, which torch cannot hold
            values = values.copy()
        return torch.from_numpy(values)


def _computable(phi: Tensor) -> Tensor:
    return phi.float() if phi.dtype in (torch.float16, torch.bfloat16) else phi


def _check_block(name: str, phi: Tensor, y: Tensor | None, first_row: int) -> None:
    if phi.ndim != 2 or not phi.is_floating_point():
        raise complaint(
            f"{name}: features of shape {tuple(phi.shape)} and type {phi.dtype}",
            "a floating-point array (n, d)",
            "Flatten or pool to one vector a sample, and convert: phi.reshape(len(phi), -1).astype('float32').",
        )
    if phi.shape[0] == 0 or phi.shape[1] == 0:
        raise _empty(name)
    require_finite(f"{name}: features", phi, first_row=first_row)
    if y is None:
        return
    if len(y) != len(phi) or y.ndim not in (1, 2):
        raise complaint(
            f"{name}: targets of shape {tuple(y.shape)} for features of shape {tuple(phi.shape)}",
            f"labels ({len(phi)},) or values ({len(phi)}, C)",
            "Give one target a sample.",
        )
    if y.ndim == 1 and (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool):
        raise complaint(
            f"{name}: labels of type {y.dtype}",
            "integer labels (n,), or floating-point values (n, C)",
            "Convert labels with y.astype('int64'); give one real-valued output as y[:, None].",
        )
    if y.ndim == 2:
        if not y.is_floating_point():
            raise complaint(
                f"{name}: targets of shape {tuple(y.shape)} and type {y.dtype}",
                "floating-point values (n, C), or integer labels (n,)",
                "Convert: y.astype('float32').",
            )
        require_finite(f"{name}: targets", y, first_row=first_row)


def _varies(phi: Tensor, first: Tensor) -> bool:
    """Whether some sample differs from the first; looks at few rows before it looks at all."""
    head = phi[:64]
    return bool((head != first).any()) or (len(phi) > 64 and bool((phi != first).any())) or len(phi) == 1


def _empty(name: str) -> ValueError:
    return complaint(
        f"{name}: no samples or no columns", "at least one sample and one feature", "Drop the empty task from the list."
    )


def _no_variance(name: str, rows: int) -> ValueError:
    return complaint(
        f"{name}: all {rows} samples have equal features (zero variance in every column)",
        "features that differ between samples",
        "Check the backbone's output: a dead layer, a constant input, or the wrong tensor.",
    )
