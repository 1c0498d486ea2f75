"""Tiny models from a config, saved and loaded as a user's would be; nothing is downloaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from forgetcast.backbones.cache import features_key
from forgetcast.backbones.huggingface import (
    TextTokenizer,
    as_backbone,
    huggingface_backbone,
    huggingface_pretrained,
    pool,
    preprocessing_of,
)
from forgetcast.backbones.preprocessing import Preprocessing

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
    ("size", "crop_share"),
    [
        ({"size": 32}, 1.0),
        ({"size": {"height": 32, "width": 32}}, 1.0),
        ({"size": {"shortest_edge": 40}, "crop_size": 32}, 0.8),
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}, 1.0),
    ],
)
def test_preprocessing_is_the_models_own(size, crop_share, tmp_path):
    values = {**size, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    assert preprocessing_of(tmp_path) == Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), crop_share)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values | {"do_normalize": False}))
    assert preprocessing_of(tmp_path) == Preprocessing(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), crop_share)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(size))
    with pytest.raises(ValueError, match="cannot read the preprocessing"):
        preprocessing_of(tmp_path)


@pytest.fixture
def language_model(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = transformers.BertConfig(**SMALL, vocab_size=len(words), max_position_embeddings=12)
    transformers.BertModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_texts_become_one_tensor(language_model):
    tokenizer = TextTokenizer(language_model)
    ids, mask = tokenizer(["the cat", "sat", "the cat sat the cat"], 5).unbind(1)
    assert ids.tolist() == [[2, 5, 6, 3, 0], [2, 7, 3, 0, 0], [2, 5, 6, 7, 3]]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    before = tokenizer.hash
    assert TextTokenizer(language_model).hash == before
    tokens = json.loads((language_model / "tokenizer.json").read_text())
    tokens["model"]["vocab"] |= {"cat": 7, "sat": 6}
    (language_model / "tokenizer.json").write_text(json.dumps(tokens))
    assert TextTokenizer(language_model).hash != before


def test_padding_changes_no_feature(language_model):
    backbone = huggingface_backbone(language_model)
    tokenizer = huggingface_pretrained(str(language_model)).tokenizer()
    texts = ["the cat", "sat the cat sat"]
    short, long = (backbone(tokenizer(texts, length)) for length in (6, 12))
    assert torch.allclose(short, long, atol=1e-6)
    with pytest.raises(ValueError, match="got 13 tokens a text; expected at most 12, which the model takes"):
        tokenizer(texts, 13)


def test_features_are_kept_apart_by_pooling_and_settings():
    def key(pooling, **settings):
        torch.manual_seed(0)
        config = transformers.BertConfig(**(SMALL | settings), vocab_size=50)
        return features_key(as_backbone(transformers.BertModel(config), pooling), 3, data_hash="a")

    assert key("mean") == key("mean")
    assert (
        len({key("mean"), key("class_token"), key("mean", num_attention_heads=4), key("mean", hidden_act="relu")}) == 4
    )


@pytest.mark.parametrize(("lost", "refused"), [("pooler", False), ("encoder.layer.1.output", True)])
def test_weights_that_lack_a_part_are_refused(language_model, lost, refused):
    path = language_model / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if lost not in name}
    save_file(kept, path, metadata={"format": "pt"})
    if not refused:
        assert huggingface_backbone(language_model).width == 16
        return
    with pytest.raises(ValueError, match=r"lack \['encoder.layer.1.output.*\(4 in all\); expected all weights"):
        huggingface_backbone(language_model)
