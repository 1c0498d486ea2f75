"""The rows of the table of rivals, how each is trained, and which published orderings are looked for in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any

from benchmarks.projection_runs import TUNERS
from benchmarks.projection_settings import Setting
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.base import Method
from forgetcast.methods.registry import create, method_class, takes_steps

EPOCHS, BATCH, TASKS = 2, 16, 5
KEPT = 300
"""Samples that methods of rehearsal may keep: 3 a class of CIFAR-100, 2 of CLINC150."""
ADAMW = Optimization(epochs=EPOCHS, batch_size=BATCH)
SGD = Optimization(
    optimizer="sgd", momentum=0.9, weight_decay=5e-4, epochs=EPOCHS, batch_size=BATCH, schedule="cosine_by_epoch"
)
RATES = {"adamw": (3e-4, 2e-3, 1e-2), "sgd": (0.01, 0.03, 0.1)}
WHOLE = "all weights"
BLOCKS = {"vit": 3, "minilm": 2}
OWN: Mapping[str, Any] = {"loss_outputs": "task"}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        label: what it is called.
        method: a name of the registry.
        options: of the method.
        tuner: a name of `projection_runs.TUNERS`, put in before; `WHOLE` where all weights of the upper blocks train;
            None where the method puts in its own parts, or none.
        optimization: at a rate to be chosen.
        layers: options that name blocks: from which on, up to which.
        scaled: options that are this multiple of the chosen rate.
        absent: why it is not measured, by data set.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tuner: str | None = None
    optimization: Optimization = ADAMW
    layers: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    scaled: Mapping[str, float] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def rates(self) -> tuple[float, ...]:
        """To choose from; none for a closed form."""
        return RATES[self.optimization.optimizer] if takes_steps(self.method, self.options) else ()

    def at(self, rate: float | None) -> Optimization:
        """How it is trained."""
        return self.optimization if rate is None else replace(self.optimization, learning_rate=rate)

    def options_of(self, setting: str, rate: float | None, seed: int) -> dict[str, Any]:
        """Of its method on a data set, at a rate and a seed."""
        blocks = range(BLOCKS[setting])
        found = dict(self.options) | {name: list(blocks[slice(*ends)]) for name, ends in self.layers.items()}
        found |= {} if rate is None else {name: factor * rate for name, factor in self.scaled.items()}
        return found | ({"seed": seed} if "seed" in signature(method_class(self.method)).parameters else {})

    def made(self, name: str, setting: Setting, folder: Path, rate: float | None, seed: int) -> Method:
        """The method, untrained; told which tokens are padding where it reads them."""
        backbone = setting.upper(folder).requires_grad_(self.tuner == WHOLE)
        if self.tuner in TUNERS:
            TUNERS[self.tuner].attach(backbone)
        method = create(self.method, backbone, setting.width, **self.options_of(name, rate, seed))
        for protection in method.protections:
            if hasattr(protection, "mask"):
                protection.mask = setting.mask
        return method

    def decided(self, setting: str, rate: float | None, seed: int) -> dict[str, Any]:
        """All that it decides of a run."""
        tuner = repr(TUNERS[self.tuner]) if self.tuner in TUNERS else self.tuner
        return {"method": self.method, "options": self.options_of(setting, rate, seed), "tuner": tuner}


def frozen(label: str, method: str, **options: Any) -> Row:
    """A closed form on frozen features."""
    return Row(label, method, options)


def tuned(label: str, method: str, tuner: str = "adapter", **options: Any) -> Row:
    """On a tuner of the backbone."""
    return Row(label, method, options, tuner)


SEQUENTIAL = "sequential, adapter"
JOINT = "joint, adapter"
ROWS: Sequence[Row] = (
    frozen("NCM", "ncm"),
    frozen("SimpleCIL", "simplecil"),
    frozen("SLDA", "slda"),
    frozen("FeCAM", "fecam"),
    frozen("ACIL", "analytic"),
    frozen("RanPAC, frozen", "ranpac"),
    Row("probe", "probe", OWN),
    Row("spectral head", "spectral", OWN),
    tuned(SEQUENTIAL, "sequential", **OWN),
    tuned("sequential, adapter, all seen outputs", "sequential"),
    tuned("sequential, LoRA", "sequential", "lora", **OWN),
    tuned(JOINT, "joint"),
    tuned("frozen after the first", "frozen", **OWN),
    tuned("adaptive", "adaptive", **OWN),
    tuned("advised", "advised", budget=0.5, capacity=100, **OWN),
    tuned("EWC", "ewc", fisher="sampled", **OWN),
    tuned("SI", "si", **OWN),
    tuned("LwF", "lwf", **OWN),
    Row(
        "spectral regulariser",
        "spectral_network",
        {"probes": 10, **OWN},
        "adapter",
        absent={"minilm": "the modes of a tangent kernel of up to 150 outputs take minutes a task"},
    ),
    tuned("replay", "replay", capacity=KEPT, count=BATCH),
    tuned("DER++", "der++", capacity=KEPT, count=BATCH),
    tuned("iCaRL", "icarl", capacity=KEPT, count=BATCH),
    *(tuned(f"PEGP, {tuner}", "pegp", tuner, **OWN) for tuner in TUNERS),
    Row("VPT-NSP2", "vpt_nsp2"),
    Row("InfLoRA", "inflora", {"tasks": TASKS, "energy": "sigma4"}),
    Row("O-LoRA", "o_lora"),
    Row("SD-LoRA", "sd_lora"),
    tuned("LAE", "lae", decay=0.998),
    Row("L2P", "l2p"),
    Row("DualPrompt", "dualprompt", layers={"general_layers": (0, 1), "expert_layers": (1, None)}),
    Row("CODA-Prompt", "coda_prompt", layers={"layers": (0, None)}),
    Row("SLCA", "slca", tuner=WHOLE, scaled={"head_rate": 1.0, "backbone_rate": 0.01}),
    tuned("SSIAT", "ssiat"),
    tuned("APER", "aper"),
    tuned("RanPAC", "ranpac", first_session=True),
    Row("EASE", "ease", optimization=SGD),
    Row(
        "NTK-CL",
        "ntk_cl",
        {"contrast": 0.03},
        absent={"minilm": "it asks for blocks that normalise before attention, and MiniLM's do so behind it"},
    ),
    Row("MOS", "mos", {"epochs": 10}, optimization=SGD),
    Row("OSF", "osf"),
)
LEFT_OUT = {
    "initialized": "the same class as `sequential`",
    "der": "DER++ without labels; docs/results.md has it",
    "kronecker_ewc": "EWC with another Fisher; docs/results.md has it",
}
"""Methods of the registry without a row, and why."""


@dataclass(frozen=True)
class Ordering:
    """What a published table says: on CIFAR-100 or ImageNet-R the last accuracy of one row is above another's."""

    better: str
    worse: str
    source: str


_NTK = "NTK-CL, arXiv 2407.17120: CIFAR-100, 10 tasks"
_SD = "SD-LoRA, arXiv 2501.13198: CIFAR-100, 10 tasks"
_RANPAC = "RanPAC, arXiv 2307.02251: CIFAR-100"
_EASE = "EASE and MOS, arXiv 2403.12030 and 2412.09441: CIFAR-100, 20 tasks, one seed"
_INFLORA = "InfLoRA, arXiv 2404.00228: CIFAR-100, 10 tasks"
_SLCA = "SLCA, arXiv 2303.05118: CIFAR-100, 10 tasks"
PUBLISHED: Sequence[Ordering] = (
    Ordering("NTK-CL", "EASE", _NTK),
    Ordering("NTK-CL", "InfLoRA", _NTK),
    Ordering("NTK-CL", "VPT-NSP2", _NTK),
    Ordering("VPT-NSP2", "EASE", _NTK),
    Ordering("EASE", "InfLoRA", _NTK),
    Ordering("CODA-Prompt", "DualPrompt", _NTK),
    Ordering("DualPrompt", "L2P", _NTK),
    Ordering("L2P", "DualPrompt", _SD),
    Ordering("SD-LoRA", "InfLoRA", _SD),
    Ordering("InfLoRA", "CODA-Prompt", _SD),
    Ordering("InfLoRA", "LAE", _INFLORA),
    Ordering("SLCA", "InfLoRA", _INFLORA),
    Ordering("InfLoRA", "sequential, LoRA", "InfLoRA, arXiv 2404.00228: ImageNet-R, 10 tasks"),
    Ordering("RanPAC", "RanPAC, frozen", _RANPAC),
    Ordering("RanPAC, frozen", "NCM", _RANPAC),
    Ordering(JOINT, "RanPAC", _RANPAC),
    Ordering("MOS", "SLCA", _EASE),
    Ordering("SLCA", "EASE", _EASE),
    Ordering("EASE", "APER", _EASE),
    Ordering("APER", "SimpleCIL", _EASE),
    Ordering("SimpleCIL", "L2P", _EASE),
    Ordering("L2P", "sequential, adapter, all seen outputs", _EASE),
    Ordering(JOINT, "SLCA", _SLCA),
)
