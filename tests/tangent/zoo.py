"""Awkward modules, each with inputs of a few samples and its parameters: what hooks must not get wrong."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

SAMPLES = 3


@dataclass(frozen=True)
class Animal:
    """A module and what is asked of it.

    `inputs` are in float64; `general` names the parameters that no rule covers; `functional` is whether
    `torch.func` can go through it.
    """

    model: nn.Module
    inputs: Any
    parameters: Any = None
    outputs: Callable[[Any], Tensor] | None = None
    general: tuple[str, ...] = ()
    functional: bool = True


ZOO: dict[str, Callable[[], Animal]] = {}


def keeper(make: Callable[[], Animal]) -> Callable[[], Animal]:
    ZOO[make.__name__] = make
    return make


def randn(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, dtype=torch.float64)


def words(length: int, size: int, least: int = 0) -> Tensor:
    return torch.randint(least, size, (SAMPLES, length))


class Function(nn.Module):
    """Modules by name and a forward written beside them."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | nn.Parameter):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.compute = forward

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        return self.compute(self, *inputs, **named)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 2)


@keeper
def perceptron() -> Animal:
    return Animal(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 3)), randn(5))


@keeper
def no_bias() -> Animal:
    return Animal(nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False)), randn(5))


@keeper
def bias_only() -> Animal:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3))
    return Animal(model, randn(5), lambda name, _: name.endswith("bias"))


@keeper
def in_place_activations() -> Animal:
    layers = [nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 7), nn.SiLU(inplace=True), nn.Linear(7, 3)]
    return Animal(nn.Sequential(*layers), randn(5))


@keeper
def one_module_three_times() -> Animal:
    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.shared(x))
        return self.head(x)

    return Animal(
        Function(forward, shared=nn.Linear(6, 6), head=nn.Linear(6, 3)), randn(4, 6), outputs=lambda y: y[:, 0]
    )


@keeper
def one_layer_on_different_lengths() -> Animal:
    def forward(self, x):
        long = self.shared(x).tanh().mean(1)
        return self.head(self.shared(x[:, :2]).mean(1) * long)

    return Animal(Function(forward, shared=nn.Linear(6, 6), head=nn.Linear(6, 3)), randn(5, 6))


@keeper
def tied_linear_layers() -> Animal:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return Animal(nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(6, 3)), randn(6))


@keeper
def tied_embedding_and_head() -> Animal:
    embedding, head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
    head.weight = embedding.weight

    def forward(self, x):
        return self.head(self.norm(self.embedding(x).mean(1)))

    model = Function(forward, embedding=embedding, norm=nn.LayerNorm(6), head=head)
    return Animal(model, words(4, 9), outputs=lambda y: y[:, :4])


@keeper
def weight_used_functionally() -> Animal:
    def forward(self, x):
        return functional.linear(torch.tanh(self.layer(x)), self.layer.weight.T)

    return Animal(Function(forward, layer=nn.Linear(5, 4)), randn(5), general=("layer.weight",))


@keeper
def weight_only_used_functionally() -> Animal:
    def forward(self, x):
        return self.head(functional.linear(x, self.layer.weight, self.layer.bias).tanh())

    model = Function(forward, layer=nn.Linear(5, 6), head=nn.Linear(6, 3))
    return Animal(model, randn(5), general=("layer.weight", "layer.bias"))


@keeper
def frozen_parts() -> Animal:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    model[2].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return Animal(model, randn(5))


@keeper
def frozen_trunk_under_no_grad() -> Animal:
    def forward(self, x):
        with torch.no_grad():
            h = torch.tanh(self.trunk(x))
        return self.head(h)

    return Animal(Function(forward, trunk=nn.Linear(5, 6), head=nn.Linear(6, 3)), randn(5))


@keeper
def unused_parameters() -> Animal:
    def forward(self, x):
        self.side(x)
        return self.head(x)

    model = Function(forward, side=nn.Linear(5, 2), head=nn.Linear(5, 3), never=nn.Linear(2, 2), loose=parameter(4))
    return Animal(model, randn(5))


@keeper
def dropout() -> Animal:
    return Animal(nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Tanh(), nn.Linear(7, 3)).train(), randn(5))


@keeper
def batch_norm() -> Animal:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 3)
    )
    for module in model:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return Animal(model, randn(2, 5, 5))


@keeper
def convolutions() -> Animal:
    layers = [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.GroupNorm(3, 6),
        nn.ReLU(),
        nn.Conv2d(6, 4, (2, 3), padding="same", dilation=(2, 2), bias=False),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=4),
        nn.Flatten(),
    ]
    return Animal(nn.Sequential(*layers, nn.Linear(64, 3)), randn(4, 8, 8))


@keeper
def convolution_in_one_dimension() -> Animal:
    model = nn.Sequential(nn.Conv1d(3, 4, 3, stride=2, dilation=2), nn.Tanh(), nn.Conv1d(4, 2, 1), nn.Flatten())
    return Animal(model, randn(3, 9))


@keeper
def convolution_in_three_dimensions() -> Animal:
    model = nn.Sequential(
        nn.Conv3d(2, 4, (1, 2, 2), stride=(1, 2, 1), groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )
    return Animal(model, randn(2, 2, 3, 3))


@keeper
def transposed_convolution() -> Animal:
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3))
    return Animal(model, randn(2, 2, 2), general=("0.weight", "0.bias"))


@keeper
def norms() -> Animal:
    layers = [
        nn.LayerNorm([4, 6]),
        nn.RMSNorm(6),
        nn.Linear(6, 5),
        nn.LayerNorm(5, bias=False),
        nn.Flatten(),
        nn.Linear(20, 3),
    ]
    return Animal(nn.Sequential(*layers), randn(4, 6))


@keeper
def embedding_with_padding() -> Animal:
    inputs = words(5, 7)
    inputs[:, 3:] = 2
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 4), nn.Flatten(), nn.Linear(20, 3))
    return Animal(model, inputs)


@keeper
def position_embedding() -> Animal:
    def forward(self, x):
        h = self.token(x) + self.position(torch.arange(x.shape[1]))
        return self.head(torch.tanh(h).mean(1))

    model = Function(forward, token=nn.Embedding(9, 4), position=nn.Embedding(8, 4), head=nn.Linear(4, 3))
    return Animal(model, words(SAMPLES, 9), general=("position.weight",))


@keeper
def prompt_tokens() -> Animal:
    def forward(self, x):
        h = torch.cat([self.prompt.expand(len(x), -1, -1), x], 1)
        return self.head(self.attention(h, h, h, need_weights=False)[0].mean(1))

    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    model = Function(forward, prompt=parameter(1, 2, 6), attention=attention, head=nn.Linear(6, 3))
    general = ("prompt", "attention.in_proj_weight", "attention.in_proj_bias")
    return Animal(model, randn(4, 6), general=(*general, "attention.out_proj.weight", "attention.out_proj.bias"))


@keeper
def shared_prompts_through_a_layer() -> Animal:
    """The prompts are as many as the samples of a survey, and belong to none of them."""

    def forward(self, x):
        return self.head(x * torch.tanh(self.encode(self.prompt)).mean(0))

    model = Function(forward, prompt=parameter(2, 4), encode=nn.Linear(4, 6), head=nn.Linear(6, 3))
    return Animal(model, randn(6), general=("prompt", "encode.weight", "encode.bias"))


@keeper
def channel_scales() -> Animal:
    def forward(self, x):
        return self.head(x + self.scale * torch.tanh(self.layer(x)) + self.shift)

    model = Function(forward, scale=parameter(6), shift=parameter(1), layer=nn.Linear(6, 6), head=nn.Linear(6, 3))
    return Animal(model, randn(6), general=("scale", "shift"))


@keeper
def scalar_parameter() -> Animal:
    def forward(self, x):
        return self.layer(x) * self.temperature.exp()

    return Animal(
        Function(forward, temperature=nn.Parameter(torch.tensor(0.3)), layer=nn.Linear(5, 3)),
        randn(5),
        general=("temperature",),
    )


@keeper
def weight_norm() -> Animal:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 3))
    general = ("0.parametrizations.weight.original0", "0.parametrizations.weight.original1")
    return Animal(model, randn(5), general=general)


@keeper
def linear_with_another_forward() -> Animal:
    class Squared(nn.Linear):
        def forward(self, x):
            return functional.linear(x, self.weight**2, self.bias)

    return Animal(nn.Sequential(Squared(5, 6), nn.Tanh(), nn.Linear(6, 3)), randn(5), general=("0.weight", "0.bias"))


@keeper
def forward_replaced_on_the_instance() -> Animal:
    layer = nn.Linear(5, 6)
    layer.forward = lambda x: functional.linear(x, 2 * layer.weight, layer.bias)
    return Animal(nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3)), randn(5), general=("0.weight", "0.bias"))


@keeper
def hook_that_doubles() -> Animal:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    model[2].register_forward_pre_hook(lambda module, inputs: (3 * inputs[0],))
    return Animal(model, randn(5))


@keeper
def residual_reuse() -> Animal:
    def forward(self, x):
        h = self.first(x)
        return self.head(h + torch.tanh(self.second(h)) * h)

    return Animal(Function(forward, first=nn.Linear(5, 6), second=nn.Linear(6, 6), head=nn.Linear(6, 3)), randn(5))


@keeper
def nested_containers() -> Animal:
    def forward(self, x):
        for layer in self.blocks:
            x = x + layer["up"](torch.relu(layer["down"](x)))
        return self.head(x)

    blocks = nn.ModuleList(nn.ModuleDict({"down": nn.Linear(6, 3), "up": nn.Linear(3, 6)}) for _ in range(3))
    return Animal(Function(forward, blocks=blocks, head=nn.Linear(6, 3)), randn(6))


@keeper
def dictionary_in_dictionary_out() -> Animal:
    def forward(self, *, x, more):
        h = torch.tanh(self.layer(x)) + more["y"]
        return {"hidden": h, "logits": self.head(h), "none": None}

    inputs = {"x": randn(5), "more": {"y": randn(6)}}
    return Animal(Function(forward, layer=nn.Linear(5, 6), head=nn.Linear(6, 3)), inputs)


@keeper
def tuple_in_tuple_out() -> Animal:
    def forward(self, x, y):
        h = self.layer(x) * y
        return h, (self.head(torch.tanh(self.scale * h)), h)

    model = Function(forward, layer=nn.Linear(5, 6), head=nn.Linear(6, 3), scale=parameter(1))
    return Animal(model, (randn(5), randn(6)), outputs=lambda out: out[1][0] + out[0][:, :3], general=("scale",))


@keeper
def samples_on_the_second_axis() -> Animal:
    """As many tokens as samples, so that shapes do not tell the axes apart."""

    def forward(self, x):
        h = x.transpose(0, 1)
        return self.head(torch.tanh(self.layer(h)).transpose(0, 1).mean(1))

    return Animal(Function(forward, layer=nn.Linear(5, 6), head=nn.Linear(6, 3)), randn(SAMPLES, 5))


@keeper
def as_many_tokens_as_samples_surveyed() -> Animal:
    def forward(self, x):
        return self.head(torch.tanh(self.layer(x.transpose(0, 1))).transpose(0, 1).mean(1))

    return Animal(Function(forward, layer=nn.Linear(5, 6), head=nn.Linear(6, 3)), randn(2, 5))


@keeper
def tokens_flattened_into_samples() -> Animal:
    def forward(self, x):
        n, tokens, width = x.shape
        h = torch.tanh(self.layer(x.transpose(0, 1).reshape(tokens * n, width)))
        return self.head(h.reshape(tokens, n, -1).mean(0))

    model = Function(forward, layer=nn.Linear(5, 6), head=nn.Linear(6, 3))
    return Animal(model, randn(SAMPLES, 5), general=("layer.weight", "layer.bias"))


@keeper
def torch_encoder_layer() -> Animal:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    general = tuple(
        f"0.self_attn.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    )
    return Animal(nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 3)), randn(4, 8), general=general)


@keeper
def recurrent() -> Animal:
    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])

    model = Function(forward, lstm=nn.LSTM(4, 5, batch_first=True), head=nn.Linear(5, 3))
    return Animal(
        model,
        randn(3, 4),
        general=tuple(f"lstm.{n}" for n in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")),
    )


@keeper
def experts_that_see_some_samples() -> Animal:
    def forward(self, x):
        out = torch.zeros(len(x), 4, dtype=x.dtype)
        route = (x[:, 0] > 0).long()
        for place, expert in enumerate(self.experts):
            out = out.index_put((route == place,), expert(x[route == place]))
        return self.head(torch.tanh(out))

    model = Function(forward, experts=nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 4)]), head=nn.Linear(4, 3))
    inputs = randn(5)
    inputs[:, 0] = torch.tensor([1.0, 2.0, -1.0])  # the two samples of the survey go to the same expert
    return Animal(model, inputs, general=("experts.0.weight", "experts.0.bias"))


@keeper
def expert_that_the_survey_does_not_meet() -> Animal:
    def forward(self, x):
        h = self.always(x)
        if bool((x[:, 0] < 0).any()):
            h = torch.where(x[:, :1] < 0, self.seldom(x), h)
        return self.head(torch.tanh(h))

    model = Function(forward, always=nn.Linear(5, 4), seldom=nn.Linear(5, 4), head=nn.Linear(4, 3))
    inputs = randn(5)
    inputs[:, 0] = torch.tensor([1.0, 2.0, -1.0])
    return Animal(model, inputs)


@keeper
def checkpointed() -> Animal:
    def forward(self, x):
        return self.head(checkpoint(self.block, x, use_reentrant=False))

    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    return Animal(Function(forward, block=block, head=nn.Linear(6, 3)), randn(6), functional=False)


@keeper
def bert() -> Animal:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=20, max_position_embeddings=8, num_labels=3))
    mask = torch.ones(SAMPLES, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    inputs = {"input_ids": words(5, 20, least=1), "attention_mask": mask}
    return Animal(model, inputs, general=("bert.embeddings.position_embeddings.weight",))


@keeper
def vit() -> Animal:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))
    general = ("vit.embeddings.cls_token", "vit.embeddings.position_embeddings")
    return Animal(model, {"pixel_values": randn(3, 8, 8)}, general=general)


@keeper
def gpt2() -> Animal:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=6, vocab_size=11, bos_token_id=1, eos_token_id=2)
    )
    general = ("transformer.wpe.weight",)
    return Animal(model, {"input_ids": words(4, 11)}, outputs=lambda out: out.logits[:, -1, :4], general=general)


def with_lora(model: nn.Module, *, scale: float = 0.5, **settings: Any) -> nn.Module:
    """LoRA of rank 2 by peft, whose second factor is moved away from zero by `scale`."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that has been replaced
        model = get_peft_model(model, LoraConfig(r=2, **settings))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=scale)
    return model


def adapted(targets: list[str], **settings: Any) -> nn.Module:
    """A small ViT with LoRA."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    vit = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))
    return with_lora(vit, target_modules=targets, **settings)


@keeper
def lora() -> Animal:
    model = adapted(["q_proj", "v_proj"], modules_to_save=["classifier"])
    return Animal(model, {"pixel_values": randn(3, 8, 8)})


def gpt2_with_lora(**settings: Any) -> nn.Module:
    """GPT-2 fuses query, key and value in one weight, kept transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 1, "eos_token_id": 2}
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=6, vocab_size=11, **ends))
    return with_lora(model, target_modules=["c_attn"], fan_in_fan_out=True, **settings)


@keeper
def lora_on_fused_projections() -> Animal:
    return Animal(gpt2_with_lora(), {"input_ids": words(4, 11)}, outputs=lambda out: out.logits[:, -1, :4])


@keeper
def lora_with_decomposed_weights() -> Animal:
    """DoRA uses the factors' weights functionally."""
    layer = "base_model.model.transformer.h.0.attn.c_attn."
    parts = ("lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight")
    general = tuple(layer + part for part in parts)
    model = gpt2_with_lora(use_dora=True)
    return Animal(model, {"input_ids": words(4, 11)}, outputs=lambda out: out.logits[:, -1, :4], general=general)
