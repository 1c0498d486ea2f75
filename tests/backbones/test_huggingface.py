"""Tiny models from a config, saved and loaded as a user's would be; nothing is downloaded."""

import json

import pytest
import torch

from forgetcast.backbones.huggingface import Preprocessing, huggingface_backbone, pool, preprocessing_of

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"image_size": 16, "patch_size": 8}


def models():
    return {
        "vit": (transformers.ViTModel(transformers.ViTConfig(**SMALL, **IMAGE)), "class_token"),
        "dinov2": (transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, **IMAGE)), "class_token"),
        "clip": (transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL, **IMAGE)), "class_token"),
        "bert": (transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=50)), "mean"),
        "gpt2": (
            transformers.GPT2Model(
                transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
            ),
            "last_token",
        ),
    }


def inputs(kind: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    if kind in ("vit", "dinov2", "clip"):
        return torch.randn(5, 3, 16, 16, generator=draw)
    ids = torch.randint(1, 50, (5, 7), generator=draw)
    mask = (torch.arange(7) < torch.tensor([[7], [3], [5], [1], [7]])).long()
    return torch.stack([ids * mask, mask], 1)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip", "bert", "gpt2"])
def test_loaded_backbone_gives_the_models_own_features(kind, tmp_path):
    model, pooling = models()[kind]
    model.save_pretrained(tmp_path)
    backbone = huggingface_backbone(tmp_path)
    assert backbone.pooling == pooling
    assert backbone.width == 16
    assert not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    phi = backbone(inputs(kind))
    assert phi.shape == (5, 16)
    with torch.no_grad():
        batch = inputs(kind)
        if kind in ("vit", "dinov2", "clip"):
            expected = model.eval()(pixel_values=batch).last_hidden_state[:, 0]
        else:
            lengths = batch[:, 1].sum(1)
            rows = []
            for row, length in zip(batch, lengths, strict=True):  # each alone, without its padding
                hidden = model.eval()(input_ids=row[:1, :length]).last_hidden_state[0]
                rows.append(hidden.mean(0) if pooling == "mean" else hidden[-1])
            expected = torch.stack(rows)
    assert torch.allclose(phi, expected, atol=1e-5)


@pytest.mark.usefixtures("unchecked_types")
def test_inputs_of_another_kind_and_models_that_are_not_there(tmp_path):
    model, _ = models()["vit"]
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"inputs of shape \(5, 16\).*expected images"):
        huggingface_backbone(tmp_path)(torch.zeros(5, 16))
    with pytest.raises(ValueError, match="cannot load .*Check the name"):
        huggingface_backbone(tmp_path / "nothing")
    with pytest.raises(ValueError, match="one of"):
        huggingface_backbone(tmp_path, pooling="max")


def test_pooling_by_hand():
    hidden = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(hidden, mask, "mean").tolist() == [[1, 2], [8, 9]]
    assert pool(hidden, mask, "last_token").tolist() == [[2, 3], [10, 11]]
    assert pool(hidden, mask, "class_token").tolist() == [[0, 1], [6, 7]]


@pytest.mark.parametrize(
    "size", [{"size": 32}, {"size": {"height": 32, "width": 32}}, {"size": {"shortest_edge": 40}, "crop_size": 32}]
)
def test_preprocessing_is_the_models_own(size, tmp_path):
    values = {**size, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    assert preprocessing_of(tmp_path) == Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(size))
    with pytest.raises(ValueError, match="cannot read the preprocessing"):
        preprocessing_of(tmp_path)
