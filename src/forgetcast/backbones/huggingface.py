"""Hugging Face transformers as backbones: images or texts in, one feature vector a sample out."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from forgetcast.backbones.preprocessing import Preprocessing
from forgetcast.backbones.pretrained import Pretrained
from forgetcast.checks import complaint, require_choice, require_integer, require_module

Pooling = Literal["class_token", "mean", "last_token"]
POOLINGS: tuple[Pooling, ...] = ("class_token", "mean", "last_token")
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt", "gpt_neox", "phi")
SENTENCE_ENCODERS = ("bert", "roberta", "distilbert", "mpnet", "electra", "deberta-v2", "xlm-roberta")


class Pooled(nn.Module):
    """A transformer whose last hidden states (n, tokens, d) are pooled to features (n, d).

    Args:
        model: a Hugging Face model that returns `last_hidden_state`.
        pooling: "class_token" takes the first token, "mean" the mean over (unpadded) tokens, "last_token" the last
            unpadded one (decoders).

    Images are (n, 3, h, w) floats; texts are (n, 2, length) integers, token ids and attention mask (`TextTokenizer`):
    either way one tensor that is indexed by sample, so that loop, memories and caches need not tell them apart.
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

    def extra_repr(self) -> str:
        """Pooling and settings, which neither weights nor layers show: features kept on disk are keyed by this."""
        config: Any = self.model.config
        settings = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        return f"pooling={self.pooling}, config={digest[:16]}"

    def forward(self, inputs: Tensor) -> Float[Tensor, "n d"]:
        """Features of a batch.

        Raises:
            ValueError: inputs that are neither images nor tokenized texts, or not what the model takes.
        """
        takes: Any = self.model.main_input_name
        if inputs.is_floating_point() and inputs.ndim == 4 and takes == "pixel_values":
            hidden = self.model(pixel_values=inputs).last_hidden_state
            mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        elif not inputs.is_floating_point() and inputs.ndim == 3 and inputs.shape[1] == 2 and takes == "input_ids":
            longest = max(int(inputs[:, 1].sum(1).max()), 1)  # the padding that the whole batch shares costs time alone
            mask = inputs[:, 1, :longest]
            hidden = self.model(input_ids=inputs[:, 0, :longest], attention_mask=mask).last_hidden_state
        else:
            raise complaint(
                f"inputs of shape {tuple(inputs.shape)} and type {inputs.dtype} for a model that takes {takes}",
                "images (n, 3, h, w) as floats, or tokenized texts (n, 2, length) as integers",
                "Use an image pipeline, or TextTokenizer; or choose a model for this kind of data.",
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
        ValueError: no such model, one without safetensors, or with weights that lack a part of it.
    """
    transformers = require_module("transformers", "huggingface")
    try:
        kind = transformers.AutoConfig.from_pretrained(name).model_type
        clip = kind in ("clip", "clip_vision_model")
        loader: Any = transformers.CLIPVisionModel if clip else transformers.AutoModel
        model, found = loader.from_pretrained(name, use_safetensors=True, output_loading_info=True)
    except OSError as error:
        raise complaint(
            f"cannot load {name} ({error})",
            "a model of the Hugging Face hub or a directory, with its weights as safetensors",
            "Check the name; offline, give a local directory; convert old weights with model.save_pretrained.",
        ) from error
    # A pooler is often missing, and nothing here reads it; any other missing weight would be a random one.
    missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)
    if missing:
        raise complaint(
            f"the weights of {name} lack {missing[:3]} ({len(missing)} in all)",
            "all weights of a model of its configuration",
            "Give a complete checkpoint.",
        )
    return as_backbone(model, pooling)


def as_backbone(model: nn.Module, pooling: Pooling | None = None) -> Pooled:
    """A transformers model already in memory as a backbone: frozen, in evaluation mode."""
    if pooling is None:
        kind = getattr(model.config, "model_type", "")
        pooling = "last_token" if kind in DECODERS else "mean" if kind in SENTENCE_ENCODERS else "class_token"
    return Pooled(model.requires_grad_(False).eval(), pooling).eval()


def huggingface_pretrained(name: str, *, pooling: Pooling | None = None) -> Pretrained:
    """`huggingface_backbone` with the preprocessing of images or the tokenizer that the model brings.

    Raises:
        ValueError: as `huggingface_backbone`.
    """
    backbone = huggingface_backbone(name, pooling=pooling)
    positions = getattr(backbone.model.config, "max_position_embeddings", None)
    return Pretrained(backbone, backbone.model, lambda: preprocessing_of(name), lambda: TextTokenizer(name, positions))


def preprocessing_of(name: str | Path) -> Preprocessing:
    """Size, mean and standard deviation that a vision model was trained with, from its own `preprocessor_config.json`.

    Raises:
        ValueError: no such file, or one without these.
    """
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(str(name), "preprocessor_config.json")
        values = json.loads(Path(str(path)).read_text(encoding="utf-8"))
        resized, cropped = _edge(values.get("size")), _edge(values.get("crop_size"))
        size = cropped or resized
        if size is None:
            raise KeyError("size")
        share = min(size / resized, 1.0) if resized else 1.0
        if values.get("do_normalize") is False:
            return Preprocessing(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), share)
        return Preprocessing(size, tuple(values["image_mean"]), tuple(values["image_std"]), share)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise complaint(
            f"cannot read the preprocessing of {name} ({type(error).__name__}: {error})",
            "a preprocessor_config.json with size, image_mean and image_std",
            "Give size, mean and std yourself: the model card tells them.",
        ) from error


class TextTokenizer:
    """The tokenizer of a model: texts become one tensor of token ids and attention mask.

    Args:
        name: of the hub, or a directory.
        positions: that the model has; no text may be longer.

    Attributes:
        hash: SHA-256 of the tokenizer's vocabulary and rules.

    Raises:
        ValueError: no such tokenizer, or one that cannot pad.
    """

    def __init__(self, name: str | Path, positions: int | None = None) -> None:
        from transformers import AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ImportError, ValueError, KeyError, TypeError) as error:
            raise complaint(
                f"cannot load the tokenizer of {name} ({' '.join(str(error).split())})",
                "a model for texts, with its tokenizer beside it",
                "Choose a language model, or save its tokenizer with tokenizer.save_pretrained.",
            ) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise complaint(f"the tokenizer of {name} has no padding", "a padding or an end token", "Name one in it.")
        tokenizer.padding_side = "right"
        self.most = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
        content = f"{type(tokenizer).__name__} {tokenizer.pad_token} {rules}"
        self.hash = f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"

    def __call__(self, texts: Sequence[str], length: int) -> Int[Tensor, "n 2 length"]:
        """Token ids and attention mask of texts, padded on the right or cut to `length`: (n, 2, length).

        Raises:
            ValueError: a length beyond the model's positions.
        """
        require_integer("length", length, least=1)
        if length > self.most:
            raise complaint(f"got {length} tokens a text", f"at most {self.most}, which the model takes", "Lower it.")
        done = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return torch.stack([done["input_ids"], done["attention_mask"]], 1)


def _edge(size: Any) -> int | None:
    """Edge of a square, or length of a shorter side, as processors write them."""
    if size is None:
        return None
    return int(size if isinstance(size, int) else size.get("height", size.get("shortest_edge")))
