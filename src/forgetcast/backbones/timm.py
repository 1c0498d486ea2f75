"""Models of the timm library as backbones for images. Weights come from safetensors; nothing is unpickled."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from forgetcast.backbones.preprocessing import Preprocessing
from forgetcast.backbones.pretrained import Pretrained
from forgetcast.checks import complaint


def timm_backbone(name: str, weights: Path | None = None) -> Pretrained:
    """A timm model by name, frozen, in evaluation mode, without its classifier.

    Args:
        name: as `timm.create_model` takes it, such as "vit_base_patch16_224.augreg_in21k".
        weights: a state dict that timm saved, as `.safetensors` or as a PyTorch file (read with `weights_only`); by
            default the pretrained weights of the hub, of which only a `model.safetensors` is taken.

    Raises:
        ValueError: timm is missing or cannot be imported, an unknown model, weights that are missing or do not fit.
    """
    timm = _timm()
    # timm itself falls back to pickled weights where a model has no safetensors file; naming that file forbids it.
    overlay = None if weights is not None else {"hf_hub_filename": "model.safetensors", "url": ""}
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=weights is None, num_classes=0, pretrained_cfg_overlay=overlay
        )
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        raise complaint(
            f"cannot load timm:{name} ({error})",
            "a model that timm knows, with its weights as safetensors",
            "Check the name (timm.list_pretrained); offline, give model.weights, a local file.",
        ) from error
    if weights is not None:
        _load(model, weights)
    model.requires_grad_(False).eval()
    return Pretrained(model, model, lambda: _preprocessing(name, model))


def _timm() -> Any:
    try:
        import timm
    # A torchvision that does not fit the installed PyTorch fails with other errors than ImportError.
    except (ImportError, RuntimeError, AttributeError) as error:
        raise complaint(
            f"cannot import timm ({type(error).__name__}: {error})",
            "timm, and the torchvision it needs, beside this PyTorch",
            "Install it with `pip install 'forgetcast[timm]'`, with the torchvision made for your PyTorch; or use a "
            "Hugging Face model (hf:NAME).",
        ) from error
    return timm


def _load(model: nn.Module, path: Path) -> None:
    try:
        state: dict[str, Tensor] = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        found = model.load_state_dict(state, strict=False)
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, TypeError, AttributeError, EOFError) as error:
        # PyTorch's own message recommends to unpickle the file all the same.
        reason = "it holds more than tensors" if isinstance(error, UnpicklingError) else error
        raise complaint(
            f"cannot load the weights {path} ({reason})",
            "a state dict of this model, as safetensors or as plain tensors",
            "Save it with safetensors.torch.save_file(model.state_dict(), path).",
        ) from error
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    dropped = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    unexpected = [name for name in found.unexpected_keys if name.rpartition(".")[0] not in dropped]
    if found.missing_keys or unexpected:
        raise complaint(
            f"the weights {path} lack {found.missing_keys[:3]} and bring {unexpected[:3]}",
            "the parameters of this model, with or without its classifier",
            "Give the weights of this model.",
        )


def _preprocessing(name: str, model: nn.Module) -> Preprocessing:
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    try:
        mean, std = (tuple(float(value) for value in config[key]) for key in ("mean", "std"))
        return Preprocessing(int(config["input_size"][-1]), mean, std, float(config.get("crop_pct") or 1.0))  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise complaint(
            f"timm:{name} does not say how its images must look ({type(error).__name__}: {error})",
            "input_size, mean and std",
            "Give preprocessing.size, mean and std.",
        ) from error
