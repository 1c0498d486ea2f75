"""What a run stands on: backbone and inputs of a recipe, with features computed once where the backbone is frozen."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import nn

from forgetcast.backbones.cache import Read, cached_features, features_key
from forgetcast.backbones.pretrained import Pretrained
from forgetcast.backbones.trainable import choose_trainable
from forgetcast.backbones.weights import weights_hash
from forgetcast.checks import complaint
from forgetcast.learn.samples import ReadTraining
from forgetcast.methods.registry import needs_blocks
from forgetcast.modes import evaluating
from forgetcast.runs.inputs import inputs_of
from forgetcast.runs.recipe import Recipe
from forgetcast.runs.sections import ModelChoice
from forgetcast.streams.sources import Source

MLP_WIDTH = 128


@dataclass(frozen=True, eq=False)
class Prepared:
    """Backbone and inputs of a run.

    Attributes:
        backbone: maps what is read to features (n, width); where features were computed before, it hands them on.
        width: of the features.
        read: maps places in the source to what the backbone takes.
        read_training: the same for training samples changed at random, if they are, with a generator for each.
        weights: hash of the backbone's weights.
        numbers_elsewhere: weights and buffers of the backbone that the model of this run does not hold.
        record: what the record says of all this.
    """

    backbone: nn.Module
    width: int
    read: Read
    read_training: ReadTraining | None
    weights: str
    numbers_elsewhere: int
    record: dict[str, Any]


def prepare(
    recipe: Recipe,
    source: Source,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] = lambda _: None,
) -> Prepared:
    """Load or draw the backbone, and compute its features if the recipe says so.

    Args:
        recipe: with a model, its preprocessing and what trains.
        source: the samples.
        folder: where features are kept, under the hash of weights, preprocessing and samples.
        device: where features are computed.
        on_batch: called with the number of samples after each pass of that computation.

    Raises:
        ValueError: whatever backbone, preprocessing and cache refuse.

    Cost: of computed features, one pass over the whole source and 4 n d bytes on disk and in memory.
    """
    pretrained = pretrained_of(recipe.model)
    inputs = inputs_of(source, recipe.preprocessing, pretrained)
    sample = inputs.read(np.arange(min(2, len(source))))
    plain = _plain_backbone(recipe.model, sample[0].numel())
    module = plain if pretrained is None else pretrained.module
    width = _width(module, sample)
    weights = weights_hash(module.state_dict())
    numbers = sum(tensor.numel() for tensor in module.state_dict().values())
    about = {
        "backbone": {
            "name": recipe.model.backbone,
            "width": width,
            "numbers": numbers,
            "trainable": recipe.trainable if isinstance(recipe.trainable, str) else list(recipe.trainable),
        },
        "preprocessing": inputs.record,
        "cached_features": None,
    }
    if not recipe.cached:
        network = plain if pretrained is None else pretrained.network
        if recipe.model.tuner is not None:
            recipe.model.tuner.made().attach(network)
        elif recipe.model.kind != "identity" and not needs_blocks(recipe.method.name):
            module = choose_trainable(module, network, recipe.trainable, sample)
        return Prepared(module, width, inputs.read, inputs.read_training, weights, 0, about)
    computed, started = 0, monotonic()

    def count(rows: int) -> None:
        nonlocal computed
        computed += rows
        on_batch(rows)

    keyed_by = {"data_hash": source.hash, "preprocessing": json.dumps(inputs.record, sort_keys=True)}
    phi = cached_features(
        module,
        inputs.read,
        len(source),
        folder,
        batch_size=recipe.training.batch_size,
        device=device,
        on_batch=count,
        **keyed_by,
    )
    about["cached_features"] = {
        "key": features_key(module, len(source), **keyed_by),
        "samples": len(source),
        "computed": computed,
        "seconds": monotonic() - started,
    }
    return Prepared(nn.Identity(), width, lambda places: phi[torch.from_numpy(places)], None, weights, numbers, about)


def pretrained_of(model: ModelChoice) -> Pretrained | None:
    """The backbone with weights and preprocessing of its own that the section names, or None where it names none.

    One that is drawn takes its weights from PyTorch's generator.

    Raises:
        ValueError: a model that cannot be loaded.
    """
    if model.kind == "hf":
        from forgetcast.backbones.huggingface import huggingface_pretrained

        return huggingface_pretrained(model.argument, pooling=model.pooling)
    if model.kind == "vit":
        from forgetcast.backbones.drawn import WIDTH, drawn_vit

        return drawn_vit(int(model.argument or WIDTH), pooling=model.pooling)
    if model.kind == "timm":
        from forgetcast.backbones.timm import timm_backbone

        return timm_backbone(model.argument, None if model.weights is None else Path(model.weights))
    return None


def _plain_backbone(model: ModelChoice, numbers: int) -> nn.Module:
    """For `numbers` a sample: the inputs as they are, or a hidden layer drawn from PyTorch's generator."""
    if model.kind != "mlp":
        return nn.Flatten()
    width = int(model.argument or MLP_WIDTH)
    return nn.Sequential(nn.Flatten(), nn.Linear(numbers, width), nn.ReLU())


def _width(module: nn.Module, sample: torch.Tensor) -> int:
    with torch.no_grad(), evaluating(module):
        phi = module(sample)
    if phi.ndim != 2:
        raise complaint(
            f"the backbone made {tuple(phi.shape)} of inputs {tuple(sample.shape)}",
            "features (n, d), one row a sample",
            "Choose a backbone that pools its output.",
        )
    return int(phi.shape[1])
