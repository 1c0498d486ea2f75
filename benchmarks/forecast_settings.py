"""Real models and streams for the forecast table. Activations below the adapted blocks are computed once."""

import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]
TEXT_LENGTH = 16
TEXTS_AN_INTENT = 100
FIRST_TEXT_LAYER = 3
FIRST_IMAGE_BLOCK = 10
IMAGES_A_CLASS = 500
TEST_IMAGES_A_CLASS = 12


@dataclass(frozen=True, eq=False)
class Data:
    """Cached activations and labels.

    Attributes:
        train: inputs of the model, one tensor or several.
        train_labels: of them.
        test: likewise.
        test_labels: likewise.
        groups: classes of each task, in the data's own order.
    """

    train: Inputs
    train_labels: Tensor
    test: Inputs
    test_labels: Tensor
    groups: list[list[int]]


@dataclass(frozen=True, eq=False)
class Setting:
    """A model with a tuner, on data.

    Attributes:
        title: for the table.
        data: computes the cached activations.
        model: builds the tuned model from a seed.
        base: tasks that are learnt together first.
    """

    title: str
    data: Callable[[Path], Data]
    model: Callable[[Path, int], nn.Module]
    base: int


class Upper(nn.Module):
    """The upper blocks of a backbone on cached activations, pooled, under a linear head of zeros."""

    def __init__(self, blocks: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.head = nn.Linear(width, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.eval()


class UpperText(Upper):
    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        least = torch.finfo(states.dtype).min
        hidden = torch.zeros_like(mask, dtype=states.dtype).masked_fill(mask == 0, least)[:, None, None]
        out = self.blocks(states, attention_mask=hidden).last_hidden_state
        kept = mask[..., None].to(out.dtype)
        return self.head((out * kept).sum(1) / kept.sum(1))


class UpperImage(Upper):
    def __init__(self, blocks: nn.Module, norm: nn.Module, outputs: int) -> None:
        super().__init__(blocks, 192, outputs)
        self.norm = norm
        # only the class token is read: the last feed-forward network takes it alone (its sum is broadcast, unread)
        self.blocks[-1].norm2.register_forward_pre_hook(lambda _, given: (given[0][:, :1],))

    def forward(self, states: Tensor) -> Tensor:
        for block in self.blocks:
            states = block(states)
        return self.head(self.norm(states)[:, 0])


class ParallelAdapter(nn.Module):
    """A bottleneck beside the second layer of a feed-forward network: fc2(h) + up(relu(down(h)))."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank)
        self.up = nn.Linear(rank, layer.out_features)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden) + self.up(torch.relu(self.down(hidden)))


def shared(folder: Path) -> Any:
    sys.path.insert(0, str(folder))
    import load

    return load


def first_of_each(pairs: list[tuple[str, int]], most: int) -> list[tuple[str, int]]:
    counts: Counter[int] = Counter()
    kept = []
    for text, label in pairs:
        counts[label] += 1
        if counts[label] <= most:
            kept.append((text, label))
    return kept


def text_data(folder: Path, first: int = FIRST_TEXT_LAYER, texts: int = TEXTS_AN_INTENT) -> Data:
    from transformers import AutoModel, AutoTokenizer

    load = shared(folder)
    splits, domains = load.clinc150()
    names = [intent for intents in domains.values() for intent in intents]
    place = {name: k for k, name in enumerate(names)}
    tokenizer = AutoTokenizer.from_pretrained(load.minilm_directory())
    lower = AutoModel.from_pretrained(load.minilm_directory())
    lower.encoder.layer = lower.encoder.layer[:first]
    lower.eval()
    found = []
    for split in ("train", "test"):
        pairs = [(text, place[name]) for text, name in splits[split] if name in place]
        pairs = first_of_each(pairs, texts)
        read = tokenizer(
            [text for text, _ in pairs],
            padding="max_length",
            truncation=True,
            max_length=TEXT_LENGTH,
            return_tensors="pt",
        )
        ids, mask = read["input_ids"], read["attention_mask"]
        with torch.no_grad():
            states = torch.cat(
                [
                    lower(input_ids=ids[i : i + 250], attention_mask=mask[i : i + 250]).last_hidden_state
                    for i in range(0, len(ids), 250)
                ]
            )
        found += [(states, mask), torch.tensor([label for _, label in pairs])]
    groups = [[place[name] for name in intents] for intents in domains.values()]
    return Data(*found, groups)


def text_model(folder: Path, seed: int, first: int = FIRST_TEXT_LAYER) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModel

    torch.manual_seed(seed)
    model = AutoModel.from_pretrained(shared(folder).minilm_directory()).requires_grad_(False)
    model.encoder.layer = model.encoder.layer[first:]
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["query", "value"])
    return UpperText(inject_adapter_in_model(lora, model).encoder, 384, 150)


def image_data(
    folder: Path, first: int = FIRST_IMAGE_BLOCK, train: int = IMAGES_A_CLASS, test: int = TEST_IMAGES_A_CLASS
) -> Data:
    load = shared(folder)
    from deit_tiny import MEAN, STD, deit_tiny

    whole = deit_tiny()
    grid = torch.cat([whole.position, whole.position[-1:]]).view(14, 14, 192)
    position = grid.view(7, 2, 7, 2, 192).mean((1, 3)).view(49, 192)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def lower(images: np.ndarray) -> Tensor:
        parts = []
        with torch.no_grad():
            for i in range(0, len(images), 200):
                pixels = torch.from_numpy(images[i : i + 200]).permute(0, 3, 1, 2).float() / 255
                pixels = nn.functional.interpolate(pixels, size=112, mode="bicubic").clamp(0, 1)
                pixels = (pixels - mean) / std
                n = len(pixels)
                patches = pixels.reshape(n, 3, 7, 16, 7, 16).permute(0, 2, 4, 1, 3, 5).reshape(n, 49, 768)
                states = torch.cat([whole.cls_token.expand(n, 1, 192), whole.patch_embed(patches) + position], 1)
                for block in whole.blocks[:first]:
                    states = block(states)
                parts.append(states)
        return torch.cat(parts)

    found: list[Any] = []
    for split, per_class in (("train", train), ("test", test)):
        images, labels = load.cifar100(split)
        kept = np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(100)])
        found += [(lower(images[kept]),), torch.from_numpy(labels[kept])]
    return Data(*found, [list(range(10 * k, 10 * k + 10)) for k in range(10)])


def image_model(tune: Callable[[nn.Module], None], first: int = FIRST_IMAGE_BLOCK) -> Callable[[Path, int], nn.Module]:
    def build(folder: Path, seed: int) -> nn.Module:
        shared(folder)
        from deit_tiny import deit_tiny

        torch.manual_seed(seed)
        whole = deit_tiny().requires_grad_(False)
        model = UpperImage(whole.blocks[first:], whole.norm, 100)
        tune(model)
        return model

    return build


def with_lora(model: nn.Module) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    inject_adapter_in_model(lora, model.blocks)


def with_adapters(model: nn.Module) -> None:
    for block in model.blocks:
        block.fc2 = ParallelAdapter(block.fc2, 8)


SETTINGS = {
    "minilm_lora": Setting(
        "MiniLM, LoRA (r = 4) in its last 3 of 6 layers, CLINC150, 15 intents and 1,500 texts a task",
        text_data,
        text_model,
        base=5,
    ),
    "vit_lora": Setting(
        "ViT-Tiny at 112 px, LoRA (r = 4) in its last 2 of 12 blocks, CIFAR-100, 10 classes and 5,000 images a task",
        image_data,
        image_model(with_lora),
        base=5,
    ),
    "vit_adapter": Setting(
        "ViT-Tiny at 112 px, bottleneck adapters (8) in its last 2 of 12 blocks, CIFAR-100, 10 classes and 5,000 "
        "images a task",
        image_data,
        image_model(with_adapters),
        base=5,
    ),
}
