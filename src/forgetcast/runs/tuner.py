"""The section `model.tuner`: small trainable parts in a frozen pretrained backbone."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from forgetcast.runs.section import AboveZero, Count, Probability, Section
from forgetcast.tuners.adapter import Adapter
from forgetcast.tuners.lora import LoRA

OF_ADAPTERS = ("place", "activation", "scale", "bias")
OF_LORA = ("alpha", "targets", "dropout")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # a list is what YAML can say


class TunerChoice(Section):
    """A tuner and its options; those left out are the tuner's own defaults.

    Attributes:
        kind: "adapter" or "lora".
        rank: width of an adapter's bottleneck, or of LoRA's factors.
        layers: which blocks get one.
        place: of an adapter: "parallel" or "sequential".
        activation: of an adapter.
        scale: of what an adapter adds.
        bias: whether an adapter's layers have biases.
        alpha: of LoRA.
        targets: of LoRA.
        dropout: of LoRA.
    """

    kind: Literal["adapter", "lora"]
    rank: Count | None = None
    layers: Annotated[tuple[int, ...] | None, BeforeValidator(_as_tuple)] = None
    place: Literal["parallel", "sequential"] | None = None
    activation: str | None = None
    scale: AboveZero | None = None
    bias: bool | None = None
    alpha: AboveZero | None = None
    targets: Annotated[tuple[str, ...] | None, BeforeValidator(_as_tuple)] = None
    dropout: Probability | None = None

    @model_validator(mode="after")
    def _possible(self) -> "TunerChoice":
        foreign, owner = (OF_LORA, "lora") if self.kind == "adapter" else (OF_ADAPTERS, "adapter")
        self.refuse_set("model.tuner", foreign, f"it belongs to {owner}")
        self.made()
        return self

    def made(self) -> Adapter | LoRA:
        """The tuner, ready to be attached.

        Raises:
            ValueError: what the tuner refuses.
        """
        options = {key: value for key in type(self).model_fields if (value := getattr(self, key)) is not None}
        kind = options.pop("kind")
        return Adapter(**options) if kind == "adapter" else LoRA(**options)
