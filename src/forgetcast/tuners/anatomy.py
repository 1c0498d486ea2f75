"""Where the parts of a transformer are: its blocks, their projections, their feed-forward networks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from forgetcast.checks import complaint, require_integer

QUERIES = ("q_proj", "query", "q_lin", "q")
KEYS = ("k_proj", "key", "k_lin", "k")
VALUES = ("v_proj", "value", "v_lin", "v")
ATTENTION = ("attention", "attn", "self_attn", "self_attention")
NORMS = (
    "layernorm_before",
    "norm1",
    "layer_norm1",
    "ln_1",
    "input_layernorm",
    "self_attn_layer_norm",
    "attn_norm",
    "ln_attn",
)
"""Normalisations before attention; those behind it have other names."""
MIDDLES = (
    "layernorm_after",
    "norm2",
    "layer_norm2",
    "ln_2",
    "post_attention_layernorm",
    "final_layer_norm",
    "ffn_norm",
    "ln_mlp",
)
"""Normalisations before the feed-forward network of blocks that also have one before attention."""
FUSED = ("qkv", "query_key_value", "c_attn", "qkv_proj", "Wqkv")


@dataclass(frozen=True)
class Block:
    """Names of the parts of one transformer block, as `model.get_submodule` takes them.

    Attributes:
        name: of the block.
        query: the projection to queries; None where the three are one matrix, or are not to be tuned.
        key: to keys.
        value: to values.
        fused: one projection to all three.
        attention: the module that holds them.
        norm: the normalisation before it; None where there is none.
        middle: the normalisation between attention and the feed-forward network; None where the block has no norm.
        enter: the first module of the feed-forward network: it gets the input of the network.
        leave: its last module: it returns the output.
    """

    name: str
    enter: str
    leave: str
    query: str | None = None
    key: str | None = None
    value: str | None = None
    fused: str | None = None
    attention: str | None = None
    norm: str | None = None
    middle: str | None = None


@dataclass(frozen=True)
class Anatomy:
    """The blocks of a transformer, in order. Write one for a model whose names `anatomy` does not know.

    Examples:
        >>> Anatomy((Block("layers.0", enter="layers.0.up", leave="layers.0.down"),)).layers([0])[0].leave
        'layers.0.down'
    """

    blocks: tuple[Block, ...]

    def layers(self, chosen: Sequence[int] | None) -> tuple[Block, ...]:
        """Some of the blocks; all with None. Negative numbers count from the end.

        Raises:
            ValueError: a layer that is not there, or named twice.
        """
        if chosen is None:
            return self.blocks
        count = len(self.blocks)
        for layer in chosen:
            require_integer("a layer", layer, least=-count)
        places = [layer + count if layer < 0 else layer for layer in chosen]
        if not places or max(places) >= count or len(set(places)) < len(places):
            raise complaint(
                f"got layers={list(chosen)} for a model of {count} blocks",
                f"distinct numbers in {-count} .. {count - 1}, at least one",
                "Choose from these, or leave None for all.",
            )
        return tuple(self.blocks[place] for place in sorted(places))


def anatomy(model: nn.Module) -> Anatomy:
    """Find the blocks of a Hugging Face or timm transformer by the names that its kind uses.

    The blocks are the list of modules with the most parameters; in each, linear layers of the child named after
    attention are projections, the first and last of the others enter and leave the feed-forward network.

    Raises:
        ValueError: no such list, or a block without these parts.
    """
    lists = [
        (name, part)
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList | nn.Sequential) and all(_attentions(child) for child in part) and len(part)
    ]
    if not lists:
        raise complaint(
            f"found no list of transformer blocks in {type(model).__name__}",
            "a list of modules that each have a child named after attention",
            "Give anatomy=Anatomy((Block(...), ...)) with the names of its parts.",
        )
    name, blocks = max(lists, key=lambda pair: sum(parameter.numel() for parameter in pair[1].parameters()))
    return Anatomy(tuple(_block(f"{name}.{k}" if name else str(k), block) for k, block in enumerate(blocks)))


def linear_like(module: nn.Module) -> bool:
    """Whether this is a linear layer; GPT-2's `Conv1D` is one, with its weight transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def widths(module: nn.Module) -> tuple[int, int]:
    """Input and output features of a linear layer, or of a wrapper that names both."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        width, out = cast(Tensor, module.weight).shape
        return width, out
    known = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(width, int) for width in known):
        raise complaint(
            f"the widths of a {type(module).__name__}",
            "a linear layer, or in_features and out_features",
            "Name linear layers in the anatomy.",
        )
    return known  # type: ignore[return-value]


def _attentions(block: nn.Module) -> list[str]:
    return [name for name, _ in block.named_children() if name.lower() in ATTENTION]


def _block(name: str, block: nn.Module) -> Block:
    attentions = _attentions(block)
    inside: list[str] = []
    outside: list[str] = []
    for place, _ in _linears(block):
        child = place.split(".")[0]
        if child in attentions:
            inside.append(place)
        elif "attn" not in child.lower() and "attention" not in child.lower():  # attention to another sequence
            outside.append(place)
    sides = (
        [widths(block.get_submodule(place))[k] for k, place in enumerate((outside[0], outside[-1]))] if outside else []
    )
    if not inside or len(set(sides)) != 1:
        raise complaint(
            f"the block {name!r} has the linear layers {inside + outside}",
            "some in its attention, and others that begin and end one feed-forward network of equal widths",
            "Give anatomy=Anatomy((Block(...), ...)) with the names of its parts.",
        )

    def named(names: Sequence[str]) -> str | None:
        found = [place for place in inside if place.rsplit(".", 1)[-1] in names]
        return f"{name}.{found[0]}" if found else None

    norm, middle = (
        next((f"{name}.{child}" for child, _ in block.named_children() if child in names), None)
        for names in (NORMS, MIDDLES)
    )
    return Block(
        name,
        f"{name}.{outside[0]}",
        f"{name}.{outside[-1]}",
        named(QUERIES),
        named(KEYS),
        named(VALUES),
        named(FUSED),
        f"{name}.{attentions[0]}",
        norm,
        middle if norm else None,
    )


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_children():
        if linear_like(part) or hasattr(part, "base_layer"):
            yield name, part
        else:
            for rest, found in _linears(part):
                yield f"{name}.{rest}", found
