"""Hugging Face transformers as backbones: images or texts in, one feature vector a sample out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from forgetcast.checks import complaint, require_choice

Pooling = Literal["class_token", "mean", "last_token"]
POOLINGS: tuple[Pooling, ...] = ("class_token", "mean", "last_token")
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt", "gpt_neox", "phi")
SENTENCE_ENCODERS = ("bert", "roberta", "distilbert", "mpnet", "electra", "deberta-v2", "xlm-roberta")


@dataclass(frozen=True)
class Preprocessing:
    """What a vision model was trained on.

    Attributes:
        size: edge of the square image, pixels.
        mean: of each channel, for pixels in [0, 1].
        std: likewise.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Pooled(nn.Module):
    """A transformer whose last hidden states (n, tokens, d) are pooled to features (n, d).

    Args:
        model: a Hugging Face model that returns `last_hidden_state`.
        pooling: "class_token" takes the first token, "mean" the mean over (unpadded) tokens, "last_token" the last
            unpadded one (decoders).

    Images are (n, 3, h, w) floats; texts are (n, 2, length) integers, token ids and attention mask (`tokenize`): either
    way one tensor that is indexed by sample.
    """

    def __init__(self, model: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        require_choice("pooling", pooling, POOLINGS)
        self.model = model
        self.pooling = pooling

    @property
    def width(self) -> int:
        """Feature width d."""
        config: Any = self.model.config
        return int(getattr(config, "hidden_size", None) or config.n_embd)

    def forward(self, inputs: Tensor) -> Float[Tensor, "n d"]:
        """Features of a batch.

        Raises:
            ValueError: inputs that are neither images nor tokenized texts.
        """
        if inputs.is_floating_point() and inputs.ndim == 4:
            hidden = self.model(pixel_values=inputs).last_hidden_state
            mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        elif not inputs.is_floating_point() and inputs.ndim == 3 and inputs.shape[1] == 2:
            mask = inputs[:, 1]
            hidden = self.model(input_ids=inputs[:, 0], attention_mask=mask).last_hidden_state
        else:
            raise complaint(
                f"inputs of shape {tuple(inputs.shape)} and type {inputs.dtype}",
                "images (n, 3, h, w) as floats, or tokenized texts (n, 2, length) as integers",
                "Use an image pipeline, or tokenize(texts).",
            )
        return pool(hidden, mask, self.pooling)


def pool(hidden: Float[Tensor, "n tokens d"], mask: Int[Tensor, "n tokens"], pooling: Pooling) -> Float[Tensor, "n d"]:
    """Hidden states pooled over the tokens that `mask` keeps."""
    if pooling == "class_token":
        return hidden[:, 0]
    if pooling == "mean":
        weight = mask.to(hidden).unsqueeze(-1)
        return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * places).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def huggingface_backbone(name: str | Path, *, pooling: Pooling | None = None) -> Pooled:
    """A pretrained model by name or local directory, frozen, in evaluation mode. Weights from safetensors only.

    Args:
        name: of the hub (cached, or downloaded where the network is allowed), or a directory.
        pooling: by default the mean for sentence encoders, the last token for decoders, the class token for the rest.

    Raises:
        ValueError: no such model, or one without safetensors.
    """
    from transformers import AutoConfig, AutoModel, CLIPVisionModel

    try:
        kind = AutoConfig.from_pretrained(name).model_type
        loader = CLIPVisionModel if kind in ("clip", "clip_vision_model") else AutoModel
        model = loader.from_pretrained(name, use_safetensors=True)
    except OSError as error:
        raise complaint(
            f"cannot load {name} ({error})",
            "a model of the Hugging Face hub or a directory, with its weights as safetensors",
            "Check the name; offline, give a local directory; convert old weights with model.save_pretrained.",
        ) from error
    return as_backbone(model, pooling)


def as_backbone(model: nn.Module, pooling: Pooling | None = None) -> Pooled:
    """A transformers model already in memory as a backbone: frozen, in evaluation mode."""
    if pooling is None:
        kind = getattr(model.config, "model_type", "")
        pooling = "last_token" if kind in DECODERS else "mean" if kind in SENTENCE_ENCODERS else "class_token"
    return Pooled(model.requires_grad_(False).eval(), pooling).eval()


def preprocessing_of(name: str | Path) -> Preprocessing:
    """Size, mean and standard deviation that a vision model was trained with, from its own `preprocessor_config.json`.

    Raises:
        ValueError: no such file, or one without these.
    """
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(str(name), "preprocessor_config.json")
        values = json.loads(Path(str(path)).read_text(encoding="utf-8"))
        size = values.get("crop_size") or values["size"]
        edge = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
        return Preprocessing(int(edge), tuple(values["image_mean"]), tuple(values["image_std"]))
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise complaint(
            f"cannot read the preprocessing of {name} ({type(error).__name__}: {error})",
            "a preprocessor_config.json with size, image_mean and image_std",
            "Give size, mean and std yourself: the model card tells them.",
        ) from error


def tokenize(name: str | Path, texts: Sequence[str], *, length: int = 64) -> Int[Tensor, "n 2 length"]:
    """Token ids and attention mask of texts, padded or cut to `length`: (n, 2, length)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    done = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return torch.stack([done["input_ids"], done["attention_mask"]], 1)
