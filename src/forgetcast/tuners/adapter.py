r"""Bottleneck adapters: a small two-layer network beside or behind a frozen feed-forward network.

    parallel:    f(x) + s U act(D x + c) + e          (arXiv 2110.04366; the adapters of LAE and PEGP)
    sequential:  f(x) + s (U act(D f(x) + c) + e)     (arXiv 1902.00751)

D is r x d, U is d x r and starts at zero, so that the model computes at first what it did without. An update of D and U
leaves old outputs alone if it vanishes on the old inputs of each (arXiv 2405.13383, eqs 8-11); with biases, on these
inputs with a 1 at their end.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from forgetcast.checks import complaint, require_choice, require_integer, require_number
from forgetcast.tuners.anatomy import Anatomy, Block, anatomy, widths
from forgetcast.tuners.base import Conditions, Part, Site, Tuned, freeze, linear_sites, require_untuned
from forgetcast.tuners.sites import sites_of

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
PART = "adapter"


class Bottleneck(Part):
    """`s U act(D x)`, from width d to width d', with dropout of the activations if any."""

    def __init__(
        self, width: int, out: int, rank: int, activation: str, scale: float, bias: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=bias)
        activated = ACTIVATIONS[activation]()
        self.activation = nn.Sequential(activated, nn.Dropout(dropout)) if dropout else activated
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

    def sites(self, name: str, conditions: Conditions) -> tuple[Site, ...]:
        """D acts on the input of the adapter, U on the activations of its bottleneck."""
        layers = (("down", self.down), ("up", self.up))
        return tuple(site for key, layer in layers for site in linear_sites(f"{name}.{key}", layer, conditions))


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
        require_untuned(model)
        blocks = (anatomy(model) if parts is None else parts).layers(self.layers)
        made = [self._made(model, block) for block in blocks]
        if len({id(model.get_submodule(block.leave)) for block in blocks}) < len(blocks):
            raise complaint(
                "blocks that are one module", "blocks of their own", "Name each shared block once in layers."
            )
        trained = freeze(model)
        return TunedByAdapters(
            model,
            self,
            trained,
            [(block, self._put(model, block, part)) for block, part in zip(blocks, made, strict=True)],
        )

    def _made(self, model: nn.Module, block: Block) -> Bottleneck:
        width, out = widths(model.get_submodule(block.enter))[0], widths(model.get_submodule(block.leave))[1]
        given = width if self.place == "parallel" else out
        like = next(model.get_submodule(block.leave).parameters())
        part = Bottleneck(given, out, self.rank, self.activation, self.scale, self.bias)
        return part.to(like.device, like.dtype)

    def _put(self, model: nn.Module, block: Block, part: Bottleneck) -> list[RemovableHandle]:
        enter, leave = model.get_submodule(block.enter), model.get_submodule(block.leave)
        leave.add_module(PART, part)
        if self.place == "sequential":
            return [leave.register_forward_hook(_behind)]
        beside = Beside()
        return [enter.register_forward_pre_hook(beside.hold), leave.register_forward_hook(beside.add)]


def _behind(module: nn.Module, _: tuple[Any, ...], found: Tensor) -> Tensor:
    changed: Tensor = found + getattr(module, PART)(found)
    return changed


class Beside:
    """Takes the input of a feed-forward network to its adapter; each thread its own, and each copy of the model."""

    def __init__(self) -> None:
        self.held: dict[int, Tensor] = {}

    def __deepcopy__(self, _: Any) -> "Beside":
        return Beside()  # what a forward pass that failed has left is no part of a copy

    def hold(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        """Before the network."""
        if not given:
            raise complaint(
                "a feed-forward network that is called with names alone",
                "its input by place",
                "Use place='sequential'.",
            )
        self.held[get_ident()] = given[0]

    def add(self, module: nn.Module, _: tuple[Any, ...], found: Tensor) -> Tensor:
        """Behind it."""
        changed: Tensor = found + getattr(module, PART)(self.held.pop(get_ident()))
        return changed


class TunedByAdapters(Tuned):
    """A model with adapters in place."""

    def __init__(
        self,
        model: nn.Module,
        options: Adapter,
        trained: Mapping[str, bool],
        placed: list[tuple[Block, list[RemovableHandle]]],
    ) -> None:
        super().__init__(model, options, trained)
        self.placed = placed

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The two layers of each adapter."""
        return {
            f"{block.leave}.{PART}.{name}": parameter
            for block, _ in self.placed
            for name, parameter in self._part(block).named_parameters()
        }

    def sites(self, conditions: Conditions = "corrected") -> tuple[Site, ...]:
        """D acts on the input of the adapter, U on the activations of its bottleneck."""
        return sites_of(self.model, conditions)

    def detach(self) -> nn.Module:
        """Take the adapters out again."""
        for block, handles in self.placed:
            for handle in handles:
                handle.remove()
            delattr(self.model.get_submodule(block.leave), PART)
        self.placed = []
        return self.thawed()

    def _part(self, block: Block) -> Bottleneck:
        part = self.model.get_submodule(f"{block.leave}.{PART}")
        assert isinstance(part, Bottleneck)
        return part
