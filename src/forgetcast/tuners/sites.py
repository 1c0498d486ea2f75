"""The sites of a whole model, whoever tuned it."""

from torch import nn

from forgetcast.checks import complaint, require_choice
from forgetcast.tuners.base import CONDITIONS, Conditions, Part, Site
from forgetcast.tuners.lora import lora_sites


def sites_of(model: nn.Module, conditions: Conditions = "corrected") -> tuple[Site, ...]:
    """Sites of every part that a tuner has put into a model, LoRA of the user's own `peft` among them.

    Args:
        model: that holds the parts at any depth; the names of the sites are its own.
        conditions: "corrected", which is exact; "paper", as PEGP's equations have them.

    Raises:
        ValueError: a model without such parts.
    """
    require_choice("conditions", conditions, CONDITIONS)
    named = list(model.named_modules())
    found = [site for name, part in named if isinstance(part, Part) for site in part.sites(name, conditions)]
    if any(name.rsplit(".", 1)[-1] == "lora_A" for name, _ in named):
        found.extend(lora_sites(model))
    if not found:
        raise complaint(
            f"no tuner in {type(model).__name__}",
            "a model with an adapter, LoRA, prefix or prompt in place",
            "Attach one, for example fc.LoRA(rank=8).attach(model).",
        )
    return tuple(found)
