r"""Bottleneck adapters: a small two-layer network beside or behind a frozen feed-forward network.

    parallel:    f(x) + s U act(D x + c) + e          (arXiv 2110.04366; the adapters of LAE and PEGP)
    sequential:  f(x) + s (U act(D f(x) + c) + e)     (arXiv 1902.00751)

D is r x d, U is d x r and starts at zero, so that the model computes at first what it did without. An update of D and U
leaves old outputs alone if it vanishes on the old inputs of each (arXiv 2405.13383, eqs 8-11); with biases, on these
inputs with a 1 at their end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from forgetcast.checks import complaint, require_choice, require_integer, require_number
from forgetcast.tuners.anatomy import Anatomy, Block, anatomy, widths
from forgetcast.tuners.base import Site, Tuned, freeze, linear_site

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
PART = "adapter"


class Bottleneck(nn.Module):
    """`s U act(D x)`, from width d to width d'."""

    def __init__(self, width: int, out: int, rank: int, activation: str, scale: float, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=bias)
        self.activation = ACTIVATIONS[activation]()
        self.up = nn.Linear(rank, out, bias=bias)
        self.scale = scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        if bias:
            nn.init.zeros_(self.down.bias)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n e"]:
        """What is added to the output of the frozen network."""
        added: Tensor = self.scale * self.up(self.activation(self.down(x)))
        return added


@dataclass(frozen=True)
class Adapter:
    """Options of bottleneck adapters.

    Attributes:
        rank: r, width of the bottleneck.
        place: beside the feed-forward network ("parallel") or behind it ("sequential").
        activation: "relu", "gelu", "silu" or "tanh".
        scale: s.
        layers: which blocks get one; None for all.
        bias: whether the two layers have biases that train.
    """

    rank: int = 8
    place: Literal["parallel", "sequential"] = "parallel"
    activation: str = "gelu"
    scale: float = 1.0
    layers: Sequence[int] | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        require_integer("rank", self.rank, least=1)
        require_choice("place", self.place, ("parallel", "sequential"))
        require_choice("activation", self.activation, ACTIVATIONS)
        require_number("scale", self.scale, strict=True)

    def attach(self, model: nn.Module, parts: Anatomy | None = None) -> "TunedByAdapters":
        """Put adapters into a model, in place, and freeze all else.

        Args:
            model: a transformer.
            parts: where its blocks are; found by name if left out (`anatomy`).

        Raises:
            ValueError: a layer that has an adapter already; a model whose blocks cannot be found.
        """
        blocks = (anatomy(model) if parts is None else parts).layers(self.layers)
        taken = [block.name for block in blocks if hasattr(model.get_submodule(block.leave), PART)]
        if taken:
            raise complaint(f"adapters in {taken} already", "a model without", "Detach them first.")
        freeze(model)
        return TunedByAdapters(model, self, [(block, self._put(model, block)) for block in blocks])

    def _put(self, model: nn.Module, block: Block) -> list[RemovableHandle]:
        enter, leave = model.get_submodule(block.enter), model.get_submodule(block.leave)
        width, out = widths(enter)[0], widths(leave)[1]
        parallel = self.place == "parallel"
        part = Bottleneck(width if parallel else out, out, self.rank, self.activation, self.scale, self.bias)
        like = next(leave.parameters())
        leave.add_module(PART, part.to(like.device, like.dtype))
        if not parallel:
            return [leave.register_forward_hook(lambda module, _, found: found + getattr(module, PART)(found))]
        waiting: list[Tensor] = []

        def hold(_: nn.Module, given: tuple[Any, ...]) -> None:
            waiting[:] = [given[0]]

        def add(module: nn.Module, _: tuple[Any, ...], found: Tensor) -> Tensor:
            changed: Tensor = found + getattr(module, PART)(waiting.pop())  # of this module: models are copied
            return changed

        return [enter.register_forward_pre_hook(hold), leave.register_forward_hook(add)]


class TunedByAdapters(Tuned):
    """A model with adapters in place."""

    def __init__(self, model: nn.Module, options: Adapter, placed: list[tuple[Block, list[RemovableHandle]]]) -> None:
        super().__init__(model)
        self.options = options
        self.placed = placed

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The two layers of each adapter."""
        return {
            f"{block.leave}.{PART}.{name}": parameter
            for block, _ in self.placed
            for name, parameter in self._part(block).named_parameters()
        }

    def sites(self) -> tuple[Site, ...]:
        """D acts on the input of the adapter, U on the activations of its bottleneck."""
        return tuple(
            linear_site(f"{block.leave}.{PART}.{name}", getattr(self._part(block), name))
            for block, _ in self.placed
            for name in ("down", "up")
        )

    def detach(self) -> nn.Module:
        """Take the adapters out again."""
        for block, handles in self.placed:
            for handle in handles:
                handle.remove()
            delattr(self.model.get_submodule(block.leave), PART)
        self.placed = []
        return self.model

    def _part(self, block: Block) -> Bottleneck:
        part = self.model.get_submodule(f"{block.leave}.{PART}")
        assert isinstance(part, Bottleneck)
        return part
