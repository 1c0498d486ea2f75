"""Features of a frozen backbone, computed once and kept on disk under the hash of what made them."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from forgetcast.backbones.weights import weights_hash
from forgetcast.checks import complaint, require_finite, require_integer

PART_ROWS = 1024  # what an interruption can cost: half a minute of a small ViT on a CPU
Read = Callable[[Int[np.ndarray, " _"]], Tensor]


def cached_features(
    backbone: nn.Module,
    read: Read,
    rows: int,
    folder: Path,
    *,
    data_hash: str,
    preprocessing: str = "",
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] = lambda _: None,
) -> Float[Tensor, "n d"]:
    """Features of samples 0 .. rows - 1, from `folder` where they are there already.

    They are kept in parts of `PART_ROWS` rows, each written as soon as it is computed: called again after an
    interruption, it goes on with the part that was not finished.

    Args:
        backbone: maps a batch to (n, d); run in evaluation mode, without gradient.
        read: maps places in the source to inputs.
        rows: number of samples.
        folder: holds one folder a key, in which each part is a safetensors file.
        data_hash: of the samples.
        preprocessing: describes how `read` prepares them: its hash or record.
        batch_size: samples a pass; no part of the key, because rows do not depend on each other.
        device: where the backbone runs.
        on_batch: called with the number of samples after each pass (a progress bar).

    Raises:
        ValueError: features that are no (n, d), NaN or infinity.
    """
    require_integer("rows", rows, least=1)
    require_integer("batch_size", batch_size, least=1)
    place = folder / features_key(backbone, rows, data_hash=data_hash, preprocessing=preprocessing)
    parts = []
    for first in range(0, rows, PART_ROWS):
        places = np.arange(first, min(first + PART_ROWS, rows))
        path = place / f"{first:09d}.safetensors"
        phi = _kept(path, len(places))
        if phi is None:
            phi = extract(backbone, read, places, batch_size, torch.device(device), on_batch)
            _keep(phi, path)
        parts.append(phi)
    return torch.cat(parts)


def features_key(backbone: nn.Module, rows: int, *, data_hash: str, preprocessing: str = "") -> str:
    """The name under which `cached_features` keeps features: SHA-256 of weights, layers, samples and preprocessing.

    How samples are split into tasks is no part of it: a feature depends on its own sample alone.
    """
    parts = [weights_hash(backbone.state_dict()), type(backbone).__qualname__, repr(backbone), data_hash, preprocessing]
    return hashlib.sha256(json.dumps([*parts, rows]).encode()).hexdigest()


def extract(
    backbone: nn.Module,
    read: Read,
    places: Int[np.ndarray, " n"],
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Float[Tensor, "n d"]:
    """Features of the samples at `places` in float32 on the CPU; the backbone is left in the mode it was in."""
    training = backbone.training
    backbone.to(device).eval()
    parts = []
    try:
        with torch.no_grad():
            for start in range(0, len(places), batch_size):
                batch = places[start : start + batch_size]
                phi = backbone(read(batch).to(device))
                if phi.ndim != 2 or len(phi) != len(batch):
                    raise complaint(
                        f"the backbone made {tuple(phi.shape)} of {len(batch)} samples",
                        "features (n, d), one row a sample",
                        "Pool its output, for example with the class token.",
                    )
                require_finite("features", phi, first_row=int(batch[0]))
                parts.append(phi.float().cpu())
                on_batch(len(batch))
    finally:
        backbone.train(training)
    return torch.cat(parts)


def _keep(phi: Tensor, path: Path) -> None:
    """Write features, which appear whole or not at all, also where another process writes the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file({"phi": phi}, part, metadata={"sha256": _checksum(phi)})
    part.replace(path)


def _checksum(phi: Tensor) -> str:
    return hashlib.sha256(phi.contiguous().numpy().tobytes()).hexdigest()


def _kept(path: Path, rows: int) -> Tensor | None:
    """Features on disk, or None where there are none or they are damaged (then they are made again)."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            phi: Tensor = file.get_tensor("phi")
            expected = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        warnings.warn(f"{path} is damaged ({error}): its features are computed again", stacklevel=3)
        return None
    if len(phi) != rows or _checksum(phi) != expected:
        warnings.warn(f"{path} is damaged (its checksum does not match): computed again", stacklevel=3)
        return None
    return phi
