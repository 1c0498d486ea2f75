"""Weights and images of the stored reference numbers of NTK-CL, made again from their names.

Uniform numbers and not normal ones: they are bits of the generator and one multiplication, the same on every machine.
"""

from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor

GAINS = ("norm.weight", "norm1.weight", "norm2.weight", "sigma")


def drawn(name: str, shape: Sequence[int]) -> Tensor:
    """float32, uniform within 0.35 of 0, of 1 for gains of normalisations and for sigma; seed: crc32 of the name."""
    generator = torch.Generator().manual_seed(crc32(name.encode()))
    noise = (torch.rand(tuple(shape), generator=generator, dtype=torch.float32) - 0.5) * 0.7
    return 1 + noise if name.endswith(GAINS) else noise


def images(name: str, count: int) -> Tensor:
    """(count, 3, 224, 224) float32: a colour for every image plus cells of 4 x 4 pixels."""
    cells = drawn(f"{name}.cells", (count, 3, 56, 56)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return drawn(f"{name}.colour", (count, 3, 1, 1)) + cells


def condensed(matrix: Tensor) -> Tensor:
    """(2 + 6, columns) for (rows, columns): the first two rows, and six drawn combinations of all rows."""
    combinations = drawn("condensed", (6, len(matrix))).to(matrix) * 5
    return torch.cat((matrix[:2], combinations @ matrix))


def as_stored(parameter: Tensor, stored: Tensor) -> Tensor:
    """The parameter in the form in which the file has it: condensed where that was too large to be stored."""
    return parameter if parameter.shape == stored.shape else condensed(parameter)
