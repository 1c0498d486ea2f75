"""A pretrained backbone with what its inputs need: the contract that all libraries of models are brought to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor, nn

from forgetcast.backbones.preprocessing import Preprocessing


@runtime_checkable
class Tokenizer(Protocol):
    """Makes one tensor of texts."""

    def __call__(self, texts: Sequence[str], length: int) -> Int[Tensor, "n 2 length"]:
        """Token ids and attention mask, padded on the right or cut to `length`."""

    @property
    def hash(self) -> str:
        """SHA-256 of all that decides the tokens."""


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A pretrained network as a backbone, frozen and in evaluation mode.

    Attributes:
        module: maps inputs to features (n, d).
        network: the part of it whose parameters have the names of the model's own library.
        preprocessing: reads how its images must look.
        tokenizer: loads its tokenizer; None where it takes no texts.

    The last two are only called for the kind of data at hand, and raise ValueError where the model has no such thing.
    """

    module: nn.Module
    network: nn.Module
    preprocessing: Callable[[], Preprocessing]
    tokenizer: Callable[[], Tokenizer] | None = None
