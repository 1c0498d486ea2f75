"""Every method by name, those that other packages bring too. A method is imported when it is asked for."""

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from forgetcast.checks import complaint, require_choice
from forgetcast.heads.linear import Linear
from forgetcast.methods.base import Method, Model
from forgetcast.methods.sequential import Sequential

METHODS: dict[str, str] = {
    "sequential": "forgetcast.methods.sequential:Sequential",
    "initialized": "forgetcast.methods.sequential:Sequential",
    "frozen": "forgetcast.methods.frozen:Frozen",
    "adaptive": "forgetcast.methods.adaptive:Adaptive",
    "advised": "forgetcast.methods.advised:Advised",
    "joint": "forgetcast.methods.joint:Joint",
    "probe": "forgetcast.methods.probe:Probe",
    "ewc": "forgetcast.methods.ewc:EWC",
    "kronecker_ewc": "forgetcast.methods.ewc:KroneckerEWC",
    "si": "forgetcast.methods.si:SI",
    "pegp": "forgetcast.methods.pegp:PEGP",
    "vpt_nsp2": "forgetcast.methods.vpt_nsp2:VPTNSP2",
    "lwf": "forgetcast.methods.lwf:LwF",
    "spectral": "forgetcast.methods.spectral:Spectral",
    "spectral_network": "forgetcast.methods.spectral_network:SpectralNetwork",
    "replay": "forgetcast.methods.replay:ExperienceReplay",
    "der": "forgetcast.methods.der:DER",
    "der++": "forgetcast.methods.der:DERPlusPlus",
    "ntk_cl": "forgetcast.methods.ntk_cl:NTKCL",
    "inflora": "forgetcast.methods.inflora:InfLoRA",
    "o_lora": "forgetcast.methods.o_lora:OLoRA",
    "sd_lora": "forgetcast.methods.sd_lora:SDLoRA",
    "lae": "forgetcast.methods.lae:LAE",
    "osf": "forgetcast.methods.osf:OSF",
    "l2p": "forgetcast.methods.l2p:L2P",
    "dualprompt": "forgetcast.methods.dualprompt:DualPrompt",
    "coda_prompt": "forgetcast.methods.coda_prompt:CODAPrompt",
    "ease": "forgetcast.methods.ease:EASE",
    "icarl": "forgetcast.methods.icarl:ICaRL",
    "slca": "forgetcast.methods.slca:SLCA",
    "ssiat": "forgetcast.methods.ssiat:SSIAT",
    "mos": "forgetcast.methods.mos:MOS",
    "ncm": "forgetcast.methods.ncm:NCM",
    "simplecil": "forgetcast.methods.ncm:SimpleCIL",
    "aper": "forgetcast.methods.aper:APER",
    "ranpac": "forgetcast.methods.ranpac:RanPAC",
    "analytic": "forgetcast.methods.analytic:ACIL",
    "slda": "forgetcast.methods.slda:SLDA",
    "fecam": "forgetcast.methods.fecam:FeCAM",
}

GROUP = "forgetcast.methods"
"""Entry points by which an installed package brings methods, `name = "module:Class"`; the names above stay."""


def method_class(name: str) -> type[Method]:
    """The class of a method, imported now.

    Raises:
        ValueError: an unknown name, where the message names the nearest; a place that holds no method.
    """
    place = METHODS[name] if name in METHODS else _brought(name)
    module, _, attribute = place.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise complaint(
            f"cannot load method {name} from {place} ({error})", "module:Class", "Correct its entry point."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise complaint(f"{place} is {found!r}", "a subclass of Method", f"Correct where method {name} is said to be.")
    return found


def _brought(name: str) -> str:
    """Where an installed package says that its method of this name is."""
    brought = {one.name: one.value for one in entry_points(group=GROUP)}
    require_choice("method", name, [*METHODS, *brought])
    return brought[name]


def takes_steps(name: str, options: Mapping[str, Any]) -> bool:
    """Whether the method of this name, made with these options, takes gradient steps in any task.

    A closed form does so in its first session, where it has one.

    Raises:
        ValueError: an unknown name.
    """
    return method_class(name).by_gradient or bool(options.get("first_session", False))


def needs_tuner(name: str) -> bool:
    """Whether the method of this name is about the parameters of a tuner, and does nothing without one.

    Raises:
        ValueError: an unknown name.
    """
    return bool(getattr(method_class(name), "needs_tuner", False))


def needs_blocks(name: str) -> bool:
    """Whether the method of this name puts parts of its own into the blocks of a transformer.

    Raises:
        ValueError: an unknown name.
    """
    return bool(getattr(method_class(name), "needs_blocks", False))


def create(name: str, backbone: nn.Module, width: int, **options: Any) -> Method:
    """A method on a backbone, with the head it asks for; one that learns by gradient gets an empty linear head.

    Args:
        name: one of `METHODS`, or of what other packages bring.
        backbone: maps inputs to features (n, width).
        width: features a sample.
        **options: further arguments of the method's class.

    Raises:
        ValueError: an unknown name, or an option out of range.
    """
    maker: Any = method_class(name)
    made: Method = (
        maker(Model(backbone, Linear(width)), **options)
        if issubclass(maker, Sequential)
        else maker(backbone, width, **options)
    )
    return made
