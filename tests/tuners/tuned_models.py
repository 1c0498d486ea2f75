"""Small transformers of many kinds, and inputs for them."""

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

WIDTH, LAYERS, HEADS = 24, 2, 2
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 32}
IMAGE = {"image_size": 16, "patch_size": 8}
TEXT = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GROUPED = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
SHORT = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 32}


class FusedAttention(nn.Module):
    """One projection to queries, keys and values, as timm has it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.num_heads = HEADS

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        query, key, value = self.qkv(x).view(n, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(n, tokens, WIDTH))


class FusedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = FusedAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FusedModel(nn.Module):
    """Takes tokens (n, tokens, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(FusedBlock() for _ in range(LAYERS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class MaskedAttention(nn.Module):
    """Of somebody's own, under a mask (n, t) of the tokens that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(query, key, value, mask[:, None, None])
        return found.transpose(1, 2).flatten(2)


class MaskedBlock(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attn = norm(8), MaskedAttention()
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(x)


class MaskedModel(nn.Module):
    """Takes tokens (n, t, 8) and which of them are there (n, t); with any normalisation before attention."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([MaskedBlock(norm), MaskedBlock(norm)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


KINDS = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL, **IMAGE), add_pooling_layer=False),
    "deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**SMALL, **IMAGE), add_pooling_layer=False),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, **IMAGE)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL, **IMAGE)),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, **TEXT), add_pooling_layer=False),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SMALL, **TEXT), add_pooling_layer=False),
    "distilbert": lambda: transformers.DistilBertModel(transformers.DistilBertConfig(**SHORT, **TEXT)),
    "gpt2": lambda: transformers.GPT2Model(transformers.GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, **TEXT)),
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**(SMALL | GROUPED), **TEXT)),
    "gpt_neox": lambda: transformers.GPTNeoXModel(transformers.GPTNeoXConfig(**SMALL, **TEXT)),
    "fused": FusedModel,
}
IMAGES = ("vit", "deit", "dinov2", "clip")


def small(kind: str, seed: int = 0) -> nn.Module:
    """A small model in double precision and evaluation mode, with weights and biases that all differ from zero."""
    torch.manual_seed(seed)
    model = KINDS[kind]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(kind: str, count: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch of five tokens a sample."""
    draw = torch.Generator().manual_seed(seed)
    if kind in IMAGES:
        return {"pixel_values": torch.randn(count, 3, 16, 16, generator=draw, dtype=torch.float64)}
    if kind == "fused":
        return {"x": torch.randn(count, 5, WIDTH, generator=draw, dtype=torch.float64)}
    return {"input_ids": torch.randint(1, 50, (count, 5), generator=draw)}


def moments(space, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Second moments (k, d, d) of what a space sees of a batch."""
    rows: list[Tensor] = []
    with space.watch(rows.append), torch.no_grad():
        hidden(model, batch)
    (seen,) = rows
    assert seen.shape[1] == len(next(iter(batch.values())))
    wide = seen.flatten(1, 2)
    found = wide.mT @ wide
    return found if space.fold is None else space.fold(found)


def hidden(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Its last hidden states."""
    found = model(**batch)
    return found if isinstance(found, Tensor) else found.last_hidden_state
