"""Every tuner by name. A tuner is imported when it is asked for."""

from importlib import import_module
from typing import Any

from forgetcast.checks import require_choice

TUNERS: dict[str, str] = {
    "adapter": "forgetcast.tuners.adapter:Adapter",
    "lora": "forgetcast.tuners.lora:LoRA",
    "prefix": "forgetcast.tuners.prefix:Prefix",
    "prompt": "forgetcast.tuners.prompt:Prompt",
}


def tuner_class(name: str) -> Any:
    """The options of a tuner as a dataclass, imported now; an instance has `attach(model)`.

    Raises:
        ValueError: an unknown name; the message names the nearest.
    """
    require_choice("tuner", name, TUNERS)
    module, _, attribute = TUNERS[name].partition(":")
    return getattr(import_module(module), attribute)
