r"""Linear layers split at a singular value, by OSF of Hugging Face `peft`: the leading part stands, the rest trains.

    W = U_k S_k V_k^T + U S V^T           the first k singular triplets are frozen; U, S and V of the others train

A change of U is allowed where U_k^T dU = 0, one of V where dV^T V_k = 0, any of S: then W V_k and U_k^T W stay. Joined,
the layer is a plain one again, W <- U_k S_k V_k^T + U S V^T, to be split anew.

`peft` projects gradients so. An optimiser that scales entries apart (Adam) leaves the space again; `allowed` gives what
its steps are to be projected by. Of `peft`'s factors the frozen ones are no part of a state; here they are, so that a
state is the same wherever it is loaded.

Source: OSF, arXiv 2504.07097; `peft.tuners.osf`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from forgetcast.checks import complaint, require_choice, require_integer, require_module, require_number
from forgetcast.tuners.anatomy import Anatomy, anatomy
from forgetcast.tuners.base import require_untuned

ADAPTER = "default"
TARGETS = ("query", "key", "value", "fused", "enter", "leave")
FROZEN = ("_osf_U_low_init", "_osf_S_low_init", "_osf_V_low_init", "_osf_U_high", "_osf_V_high")
Rank = int | float


def layers_to_split(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    parts: Anatomy | None = None,
) -> tuple[str, ...]:
    """Names of linear layers in the blocks of a transformer.

    Args:
        model: without a tuner.
        targets: of "query", "key", "value", "fused" (all three), "enter" and "leave" (of the feed-forward network);
            None for every linear layer of a block.
        layers: which blocks; None for all.
        parts: where the blocks are; found by name if left out.

    Raises:
        ValueError: a model that has a tuner, a block that lacks a target, a target that is not linear.
    """
    require_untuned(model)
    for target in targets or ():
        require_choice("a target", target, TARGETS)
    found: list[str] = []
    for block in (anatomy(model) if parts is None else parts).layers(layers):
        inside = model.get_submodule(block.name).named_modules()
        every = [f"{block.name}.{name}" for name, part in inside if isinstance(part, nn.Linear)]
        found += every if targets is None else [str(getattr(block, target)) for target in targets]
        wrong = [name for name in found if not isinstance(dict(model.named_modules()).get(name), nn.Linear)]
        if wrong or not found:
            raise complaint(
                f"{wrong or 'nothing'} in the block {block.name!r}", "layers of nn.Linear", "Choose other targets."
            )
    return tuple(dict.fromkeys(found))


def require_rank(model: nn.Module, names: Sequence[str], rank: Rank) -> None:
    """Raise unless that rank, or share of it, leaves each layer something to keep and something to train."""
    if isinstance(rank, float):
        require_number("rank", rank, most=1.0, strict=True)
    else:
        require_integer("rank", rank, least=1)
    for name in names:
        least = min(cast(Tensor, model.get_submodule(name).weight).shape)
        kept = int(least * rank) if isinstance(rank, float) else rank
        if not 0 < kept < least:
            raise complaint(
                f"rank={rank}, which keeps {kept} of the {least} directions of {name}",
                f"one that keeps 1 to {least - 1}",
                "Choose another, or other layers.",
            )


def split(model: nn.Module, names: Sequence[str], rank: Rank, *, hooks: bool = True) -> None:
    """Split layers in place, and let nothing but their trailing parts train.

    Args:
        model: the layers' own.
        names: of the layers.
        rank: k, or below 1 its share of the smaller side of each weight.
        hooks: whether `peft` projects their gradients.

    Cost: a singular value decomposition a layer, in float32. Memory: beside the weight twice the trailing U, S and V.
    """
    require_module("peft.tuners.osf", "huggingface")
    peft: Any = require_module("peft", "huggingface")
    config = peft.OSFConfig(effective_rank=rank, target_modules="|".join(map(re.escape, names)))
    model.requires_grad_(False)
    peft.tuners.osf.OSFModel(model, {ADAPTER: config}, ADAPTER)
    for _, layer in split_layers(model):
        for held in (getattr(layer, name) for name in FROZEN):
            held.persistent = True
            held.update(dict(held.items()))
        if not hooks:
            layer._detach_hooks()


def join(model: nn.Module, *, merge: bool = True) -> None:
    """Make split layers plain again, in place; with what they have learnt, or as they were."""
    for name, layer in list(split_layers(model)):
        if merge:
            layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def split_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers of `peft`'s OSF in a model, by name."""
    for name, part in model.named_modules():
        if hasattr(part, "osf_svd_params"):
            yield name, part


@dataclass(frozen=True, eq=False)
class Allowed:
    """What U or V of a split layer may become.

    Attributes:
        start: what it was when the layer was split.
        basis: orthonormal columns.
        outside: whether changes are to be outside their span, or within it: for a square factor that is the same, of
            the trailing columns.
        rows: whether this is V^T, whose directions are rows.
    """

    start: Tensor
    basis: Tensor
    outside: bool
    rows: bool

    def step(self, change: Tensor) -> Tensor:
        """What is allowed of a change. Cost: two products with the basis."""
        held = change.T if self.rows else change
        within = self.basis @ (self.basis.T @ held)
        taken = held - within if self.outside else within
        return taken.T if self.rows else taken

    def value(self, now: Tensor) -> Tensor:
        """The nearest that it may be."""
        return self.start + self.step(now - self.start)


def allowed(model: nn.Module) -> dict[str, Allowed]:
    """For U and V of each split layer, by the name of the parameter in the model."""
    found = {}
    for name, layer in split_layers(model):
        for factor in ("U", "V"):
            high, start = getattr(layer, f"_osf_{factor}_high"), getattr(layer, f"_osf_{factor}_low_init")[ADAPTER]
            outside, rows = ADAPTER in high, factor == "V"
            basis = high[ADAPTER] if outside else start
            key = f"{name}.osf_svd_params.{ADAPTER}.{factor}_low"
            found[key] = Allowed(start, basis.T if rows else basis, outside, rows)
    return found
