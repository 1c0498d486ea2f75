"""What the table of NTK-CL compares, and how each row is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.projection_settings import FIRST_IMAGE_BLOCK, IMAGES_A_CLASS, SETTINGS, cached_images
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.base import Method
from forgetcast.methods.registry import create, takes_steps
from forgetcast.tuners.adapter import Adapter
from forgetcast.tuners.lora import LoRA

TEST_IMAGES_A_CLASS = 20
SETTING = replace(
    SETTINGS["vit"],
    title=f"ViT-Tiny at 112 px, its last {12 - FIRST_IMAGE_BLOCK} of 12 blocks tuned; CIFAR-100, 10 tasks of 10 "
    f"classes, {IMAGES_A_CLASS} training and {TEST_IMAGES_A_CLASS} test images a class, drawn at random",
    cached=partial(cached_images, test=TEST_IMAGES_A_CLASS, drawn=True),
)
"""Drawn, as images stand in the order of likeness: the first ones of training and test are of the same few kinds."""
TUNERS: Mapping[str, Any] = {
    "adapter": Adapter(rank=16, activation="relu", scale=0.1, bias=True),
    "lora": LoRA(rank=4, targets=("query", "value")),
}
SGD = Optimization(
    optimizer="sgd", momentum=0.9, weight_decay=5e-4, epochs=2, batch_size=16, schedule="cosine_by_epoch"
)
"""As the paper trains CIFAR-100, but for the number of epochs (20 there)."""
ADAMW = Optimization(epochs=2, batch_size=16)
SGD_RATES, ADAMW_RATES = (0.003, 0.01, 0.025, 0.1), (1e-4, 3e-4, 1e-3, 3e-3)
HIGHER_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
"""Of what starts to train well aimed, or counts for little beside what stands still."""
PARTS = ("prompts", "fusion", "contrast", "orthogonality", "averaging", "proxies", "prototypes")
TERMS = ("contrast", "orthogonality", "drift")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        label: what it is called.
        method: a name of the registry.
        options: of the method.
        tuner: a name of `TUNERS`, put in before; None for none.
        optimization: at a rate to be chosen.
        rates: to choose from; none for a closed form.
        tuned_with: the label of the row whose rate it takes over; its own by default.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tuner: str | None = None
    optimization: Optimization = ADAMW
    rates: tuple[float, ...] = ADAMW_RATES
    tuned_with: str | None = None

    def __post_init__(self) -> None:
        assert bool(self.rates) == takes_steps(self.method, self.options)

    @property
    def source(self) -> str:
        """The row whose rate it has."""
        return self.tuned_with or self.label

    def at(self, rate: float | None) -> Optimization:
        """How it is trained."""
        return self.optimization if rate is None else replace(self.optimization, learning_rate=rate)

    def made(self, folder: Path) -> Method:
        """The method, untrained."""
        backbone: nn.Module = SETTING.upper(folder).requires_grad_(False)
        if self.tuner is not None:
            TUNERS[self.tuner].attach(backbone)
        return create(self.method, backbone, SETTING.width, **self.options)


def ntk_cl(label: str, tuned_with: str | None = None, **options: Any) -> Row:
    """NTK-CL in one of its ways."""
    return Row(label, "ntk_cl", {"tasks": 10, "contrast": 0.03, **options}, rates=HIGHER_RATES, tuned_with=tuned_with)


def closed(label: str, method: str, **options: Any) -> Row:
    """A closed form on frozen features."""
    return Row(label, method, options, rates=())


RELEASED = replace(ntk_cl("released", recipe="released"), rates=ADAMW_RATES)
OWN = (
    ntk_cl("corrected"),
    RELEASED,
    replace(RELEASED, label="released, SGD", optimization=SGD, rates=SGD_RATES),
)
PARTLY = tuple(ntk_cl(f"corrected, {part} as released", "corrected", ways={part: "released"}) for part in PARTS)
PRETRAINED = ntk_cl("corrected, with a pretrained section", "corrected", pretrained=True)
WITHOUT = tuple(ntk_cl(f"corrected, no {term}", "corrected", **{term: 0.0}) for term in TERMS)
OTHERS = (
    closed("NCM, cosine", "simplecil"),
    closed("NCM, Euclidean", "ncm"),
    closed("RanPAC", "ranpac"),
    Row("adapter", "sequential", {"loss_outputs": "task"}, "adapter"),
    Row("PEGP-LoRA", "pegp", {"loss_outputs": "task"}, "lora"),
    Row("InfLoRA", "inflora", {"tasks": 10, "energy": "sigma4"}),
    Row("EASE", "ease", rates=HIGHER_RATES),
)
ROWS: Sequence[Row] = (*OTHERS, *OWN, *PARTLY, *WITHOUT, PRETRAINED)
