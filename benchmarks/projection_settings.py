"""Real models and streams for the table of gradient projection. What lies below the tuned blocks is computed once."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from benchmarks.forecast_settings import first_of_each, shared
from forgetcast.backbones.weights import weights_hash
from forgetcast.learn.optimizer import Optimization
from forgetcast.streams.scenarios import class_incremental
from forgetcast.streams.sources import Source
from forgetcast.streams.stream import Stream

FIRST_IMAGE_BLOCK = 9
IMAGES_A_CLASS = 30
TEST_IMAGES_A_CLASS = 10
FIRST_TEXT_LAYER = 4
TEXT_LENGTH = 16
TEXTS_AN_INTENT = 20
TEST_TEXTS_AN_INTENT = 10
AT_ONCE = 200


@dataclass(frozen=True, eq=False)
class Cached:
    """Activations below the tuned blocks.

    Attributes:
        states: (n, tokens, width); for texts with a last channel more, 1 where there is a token.
        labels: (n,).
        test: places of the test samples.
        groups: labels of each task; None where the seed puts classes together.
        hash: of what they were computed from, samples and weights: their own last digits depend on the machine.
    """

    states: Tensor
    labels: Tensor
    test: Tensor
    groups: list[list[int]] | None
    hash: str

    def source(self, name: str) -> Source:
        """As a source of the library."""
        return Source(name, self.states.numpy(), self.labels.numpy(), self.test.numpy())

    def shared(self) -> "Cached":
        """In memory that worker processes read too."""
        for tensor in (self.states, self.labels, self.test):
            tensor.share_memory_()
        return self


@dataclass(frozen=True, eq=False)
class Setting:
    """A pretrained model whose upper blocks are tuned, and its tasks.

    Attributes:
        title: above its table.
        width: features a sample.
        cached: computes the activations, from the folder of the shared data sets.
        upper: the tuned blocks with pooling, pretrained, from the same folder: (n, tokens, width) to features.
        optimization: of every task, at a rate to be chosen.
        mask: which tokens of a batch are no padding; None where there is none.
    """

    title: str
    width: int
    cached: Callable[[Path], Cached]
    upper: Callable[[Path], nn.Module]
    optimization: Optimization
    mask: Callable[[Tensor], Tensor] | None = None


class UpperImage(nn.Module):
    """The last blocks of the ViT, its norm, the class token."""

    def __init__(self, blocks: nn.ModuleList, norm: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks
        self.norm = norm

    def forward(self, states: Tensor) -> Tensor:
        for block in self.blocks:
            states = block(states)
        features: Tensor = self.norm(states[:, 0])
        return features


class UpperText(nn.Module):
    """The last layers of the encoder, the mean over its tokens."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, packed: Tensor) -> Tensor:
        states, there = packed[..., :-1].contiguous(), packed[..., -1:]
        hidden = torch.zeros_like(there).masked_fill(there == 0, torch.finfo(there.dtype).min)
        out = self.encoder(states, attention_mask=hidden.transpose(1, 2)[:, None]).last_hidden_state
        features: Tensor = (out * there).sum(1) / there.sum(1)
        return features


class FusedAttention(nn.Module):
    """Attention of the shared ViT by PyTorch's own function: with all of its clips but the one on the probabilities."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.like = like

    def forward(self, x: Tensor) -> Tensor:
        like = self.like
        query, key = (part(x).clamp(-4.5 * like.qk_limit, 3.5 * like.qk_limit) for part in (like.q_proj, like.k_proj))
        value = like.v_proj(x).clamp(-4.5, 3.5)
        split = [part.unflatten(2, (like.heads, -1)).transpose(1, 2) for part in (query, key, value)]
        out = scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        found: Tensor = like.o_proj(out.clamp(-4.5 * like.output_limit, 3.5 * like.output_limit))
        return found


def pretrained_image(folder: Path) -> tuple[nn.ModuleList, nn.Module]:
    """The last blocks of the shared ViT as they were trained, and its norm."""
    shared(folder)
    from deit_tiny import deit_tiny

    whole = deit_tiny()
    return whole.blocks[FIRST_IMAGE_BLOCK:], whole.norm


def upper_images(folder: Path) -> nn.Module:
    """The same with attention that prefixes and prompts can reach."""
    blocks, norm = pretrained_image(folder)
    for block in blocks:
        block.attn = FusedAttention(block.attn)
    return UpperImage(blocks, norm)


def lower_images(folder: Path, images: np.ndarray) -> Tensor:
    """Tokens after the frozen blocks, at 112 px: positions are means over squares of four."""
    shared(folder)
    from deit_tiny import MEAN, STD, deit_tiny

    whole = deit_tiny()
    grid = torch.cat([whole.position, whole.position[-1:]]).view(7, 2, 7, 2, 192)
    position = grid.mean((1, 3)).view(49, 192)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    parts = []
    with torch.no_grad():
        for some in torch.from_numpy(images).split(AT_ONCE):
            pixels = interpolate(some.permute(0, 3, 1, 2).float() / 255, size=112, mode="bicubic").clamp(0, 1)
            patches = ((pixels - mean) / std).unflatten(3, (7, 16)).unflatten(2, (7, 16))
            patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
            states = torch.cat([whole.cls_token.expand(len(some), 1, 192), whole.patch_embed(patches) + position], 1)
            for block in whole.blocks[:FIRST_IMAGE_BLOCK]:
                states = block(states)
            parts.append(states)
    return torch.cat(parts)


def hash_of(weights: nn.Module, **samples: Tensor) -> str:
    """Of weights and of what they are given."""
    return weights_hash({**weights.state_dict(), **samples})


def cached_images(
    folder: Path, train: int = IMAGES_A_CLASS, test: int = TEST_IMAGES_A_CLASS, *, drawn: bool = False
) -> Cached:
    """Images of each class of CIFAR-100: the first ones, or drawn at random, the same ones every time."""
    load = shared(folder)
    from deit_tiny import deit_tiny

    kept, answers = [], []
    order = np.random.default_rng(0)
    for name, each in (("train", train), ("test", test)):
        images, labels = load.cifar100(name)
        within = [np.flatnonzero(labels == label) for label in range(100)]
        places = np.concatenate([(order.permutation(own) if drawn else own)[:each] for own in within])
        kept.append(images[places])
        answers.append(labels[places])
    images, labels = np.concatenate(kept), torch.from_numpy(np.concatenate(answers))
    given = hash_of(deit_tiny(), images=torch.from_numpy(images), labels=labels)
    return Cached(lower_images(folder, images), labels, torch.arange(len(answers[0]), len(labels)), None, given)


def pretrained_text(folder: Path) -> Any:
    """MiniLM without dropout."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(
        shared(folder).minilm_directory(), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).eval()


def upper_texts(folder: Path) -> nn.Module:
    """Layers of MiniLM."""
    model = pretrained_text(folder)
    model.encoder.layer = model.encoder.layer[FIRST_TEXT_LAYER:]
    return UpperText(model.encoder)


def cached_texts(folder: Path) -> Cached:
    """The first texts of each intent of CLINC150; its ten domains are the tasks."""
    from transformers import AutoTokenizer

    load = shared(folder)
    splits, domains = load.clinc150()
    place = {name: k for k, name in enumerate(name for intents in domains.values() for name in intents)}
    known = {split: [(text, place[name]) for text, name in splits[split] if name in place] for split in splits}
    train = first_of_each(known["train"], TEXTS_AN_INTENT)
    texts, labels = zip(*train, *first_of_each(known["test"], TEST_TEXTS_AN_INTENT), strict=True)
    tokenizer = AutoTokenizer.from_pretrained(load.minilm_directory())
    read = tokenizer(list(texts), padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    lower = pretrained_text(folder)
    given = hash_of(lower, ids=read["input_ids"], labels=torch.tensor(labels))
    lower.encoder.layer = lower.encoder.layer[:FIRST_TEXT_LAYER]
    parts = []
    with torch.no_grad():
        for ids, mask in zip(read["input_ids"].split(AT_ONCE), read["attention_mask"].split(AT_ONCE), strict=True):
            states = lower(input_ids=ids, attention_mask=mask).last_hidden_state
            parts.append(torch.cat([states, mask[..., None].to(states)], 2))
    groups = [[place[name] for name in intents] for intents in domains.values()]
    return Cached(torch.cat(parts), torch.tensor(labels), torch.arange(len(train), len(texts)), groups, given)


def stream_of(cached: Cached, name: str, seed: int, *, validation: bool = False) -> Stream:
    """Ten tasks in an order of the seed.

    Args:
        cached: the samples.
        name: of the source.
        seed: of the order.
        validation: whether a fifth of the training samples is set aside and takes the place of the test samples.
    """
    share = 0.2 if validation else 0.0
    source = cached.source(name)
    if cached.groups is None:
        stream = class_incremental(source, 10, seed=seed, validation_share=share)
    else:
        groups = [cached.groups[k] for k in np.random.default_rng(seed).permutation(len(cached.groups))]
        stream = class_incremental(source, groups=groups, seed=seed, validation_share=share)
    if not validation:
        return stream
    return replace(stream, tasks=tuple(replace(task, test=task.validation) for task in stream.tasks))


SETTINGS = {
    "vit": Setting(
        f"ViT-Tiny at 112 px, its last {12 - FIRST_IMAGE_BLOCK} of 12 blocks tuned; CIFAR-100, 10 tasks of 10 classes, "
        f"{IMAGES_A_CLASS} training and {TEST_IMAGES_A_CLASS} test images a class",
        192,
        cached_images,
        upper_images,
        Optimization(epochs=2, batch_size=32),
    ),
    "minilm": Setting(
        f"MiniLM, its last {6 - FIRST_TEXT_LAYER} of 6 layers tuned; CLINC150, 10 domains of 15 intents, "
        f"{TEXTS_AN_INTENT} training and {TEST_TEXTS_AN_INTENT} test texts an intent, {TEXT_LENGTH} tokens",
        384,
        cached_texts,
        upper_texts,
        Optimization(epochs=3, batch_size=32),
        lambda packed: packed[..., -1].bool(),
    ),
}
