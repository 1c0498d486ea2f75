r"""LoRA by Hugging Face `peft`, and the spaces of any model that `peft` has tuned so.

    W x + (alpha / r) B A x          A: r x d, B: d' x r, B starts at zero        (arXiv 2106.09685)

An update of A acts on the layer's inputs x, one of B on A x: both on the right (arXiv 2405.13383, eqs 12-14).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from forgetcast.checks import complaint, require_choice, require_integer, require_module, require_number
from forgetcast.tuners.anatomy import Anatomy, Block, anatomy
from forgetcast.tuners.base import Conditions, Site, Tuned, freeze, linear_sites, require_untuned

ADAPTER = "default"
TARGETS = ("query", "key", "value", "fused", "enter", "leave")


@dataclass(frozen=True)
class LoRA:
    """Options of LoRA.

    Attributes:
        rank: r.
        alpha: the added map is scaled by alpha / r; by default alpha = 2 r.
        targets: parts of each block: "query", "key", "value", "enter" or "leave" (of the feed-forward network). Where
            the three projections are one matrix, naming one of them tunes that matrix ("fused").
        layers: which blocks; None for all.
        dropout: of x on its way to A, in training.
    """

    rank: int = 4
    alpha: float | None = None
    targets: Sequence[str] = ("query", "value")
    layers: Sequence[int] | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_integer("rank", self.rank, least=1)
        require_number("dropout", self.dropout, most=0.99)
        if self.alpha is not None:
            require_number("alpha", self.alpha, strict=True)
        for target in self.targets:
            require_choice("a target", target, TARGETS)
        if not self.targets:
            raise complaint("got no targets", f"some of {list(TARGETS)}", "Leave the default: query and value.")

    def attach(self, model: nn.Module, parts: Anatomy | None = None) -> "TunedByLoRA":
        """Put LoRA into a model, in place, and freeze all else.

        Args:
            model: a transformer.
            parts: where its blocks are; found by name if left out (`anatomy`).

        Raises:
            ValueError: a model that has LoRA already, or lacks a target.
        """
        peft = _peft()
        require_untuned(model)
        blocks = (anatomy(model) if parts is None else parts).layers(self.layers)
        names = sorted({name for block in blocks for name in self._names(block)})
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        transposed = any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in names)
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=alpha,
            lora_dropout=self.dropout,
            target_modules="|".join(map(re.escape, names)),  # of a list peft would match the ends of names
            fan_in_fan_out=transposed,
        )
        trained = freeze(model)
        return TunedByLoRA(peft.tuners.lora.LoraModel(model, {ADAPTER: config}, ADAPTER), self, trained)

    def _names(self, block: Block) -> list[str]:
        found = []
        for target in self.targets:
            name = getattr(block, target) or (block.fused if target in ("query", "key", "value") else None)
            if name is None:
                raise complaint(f"the block {block.name!r} has no {target}", "a part of it", "Choose other targets.")
            found.append(name)
        return found


class TunedByLoRA(Tuned):
    """A model with LoRA in place."""

    def __init__(self, wrapper: Any, options: LoRA, trained: Mapping[str, bool]) -> None:
        super().__init__(wrapper.model, options, trained)
        self.wrapper = wrapper

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """A and B of each pair."""
        return {name: value for name, value in self.model.named_parameters() if "lora_" in name}

    def sites(self, conditions: Conditions = "corrected") -> tuple[Site, ...]:  # noqa: ARG002 - the paper's are exact
        """A acts on the input of its layer, B on A x."""
        return lora_sites(self.model)

    def detach(self) -> nn.Module:
        """Take the pairs out again."""
        self.wrapper.unload()
        return self.thawed()

    def merge(self) -> nn.Module:
        """Add each (alpha / r) B A to the weight of its layer, and take the pairs out."""
        self.wrapper.merge_and_unload()
        return self.thawed()

    def save(self, folder: str | Path) -> None:
        """Write what `peft.PeftModel.from_pretrained(model, folder)` reads: safetensors and its settings as JSON."""
        folder = self.folder(folder)
        config = self.wrapper.peft_config[ADAPTER]
        config.save_pretrained(folder)
        state = {f"{PREFIX}{_without_adapter(name)}": value.contiguous() for name, value in self.state().items()}
        part = folder / f"{WEIGHTS}.part"
        save_file(state, part, metadata={"format": "pt"})
        part.replace(folder / WEIGHTS)

    def load(self, folder: str | Path) -> None:
        """Read weights that `save` or `peft` wrote.

        Raises:
            ValueError: no such file; other parameters or another rank than this model's.
        """
        path = Path(folder) / WEIGHTS
        if not path.exists():
            raise complaint(f"no {WEIGHTS} in {folder}", "a folder that save() or peft wrote", "Check the path.")
        self._check_scale(Path(folder))
        found = load_file(path)
        names = {f"{PREFIX}{_without_adapter(name)}": name for name in self.named_parameters()}
        self.load_state({names.get(key, key): value for key, value in found.items()})

    def _check_scale(self, folder: Path) -> None:
        path = folder / "adapter_config.json"
        saved = json.loads(path.read_text()) if path.exists() else {}
        own = self.wrapper.peft_config[ADAPTER]
        for key in ("lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "use_dora"):
            if saved.get(key, getattr(own, key)) != getattr(own, key):
                raise complaint(
                    f"LoRA saved with {key}={saved[key]} for a model with {getattr(own, key)}",
                    "the same scale of the added map",
                    "Attach LoRA with the options that it was saved with.",
                )


PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def lora_sites(model: nn.Module) -> tuple[Site, ...]:
    """The sites of every LoRA pair that trains in a model, whoever put it there.

    Raises:
        ValueError: DoRA, whose update is not linear in its parameters; a pair on an embedding or a convolution.
    """
    layer_type = _peft().tuners.lora.LoraLayer
    found: list[Site] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, layer_type):
            continue
        besides = [key for key, value in layer.get_base_layer().named_parameters() if value.requires_grad]
        if besides:
            raise complaint(
                f"{name} trains its own {besides} beside LoRA", "a frozen layer", "Leave bias='none' in LoraConfig."
            )
        for factor in ("lora_A", "lora_B"):
            for adapter, part in getattr(layer, factor).items():
                if not any(
                    value.requires_grad for value in (part.parameters() if isinstance(part, nn.Module) else [part])
                ):
                    continue
                if not isinstance(part, nn.Linear) or layer.use_dora.get(adapter, False):
                    raise complaint(
                        f"{name} carries {'DoRA' if isinstance(part, nn.Linear) else type(part).__name__}",
                        "plain LoRA on linear layers",
                        "Freeze it, or tune linear layers with plain LoRA.",
                    )
                found.extend(linear_sites(f"{name}.{factor}.{adapter}", part))
    return tuple(found)


def _without_adapter(name: str) -> str:
    return name.replace(f".{ADAPTER}.", ".")


def _peft() -> Any:
    require_module("peft.tuners.lora", "huggingface")
    return require_module("peft", "huggingface")
