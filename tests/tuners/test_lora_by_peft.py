"""LoRA through peft: merging, peft's own files, users' own models."""

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from test_tuners import trained  # noqa: E402
from tuned_models import hidden, inputs, small  # noqa: E402

from forgetcast.tuners.anatomy import anatomy  # noqa: E402
from forgetcast.tuners.lora import LoRA, lora_sites  # noqa: E402

# peft asks transformers for a property that has been renamed
RENAMED = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("kind", ["vit", "gpt2", "fused"])
def test_merged_weights_compute_the_same(kind):
    tuned = LoRA(rank=3).attach(small(kind))
    trained(tuned, kind)
    expected = hidden(tuned.model, inputs(kind, 3))
    model = tuned.merge()
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert torch.allclose(hidden(model, inputs(kind, 3)), expected, atol=1e-12)


@RENAMED
def test_peft_reads_what_is_saved_and_its_files_are_read(tmp_path):
    tuned = LoRA(rank=3, alpha=5).attach(small("bert"))
    trained(tuned, "bert")
    expected = hidden(tuned.model, inputs("bert", 3))
    tuned.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(small("bert"), tmp_path / "ours").eval()
    assert torch.allclose(hidden(theirs, inputs("bert", 3)), expected, atol=1e-12)
    theirs.save_pretrained(tmp_path / "theirs")
    again = LoRA(rank=3, alpha=5).attach(small("bert"))
    again.load(tmp_path / "theirs")
    assert torch.allclose(hidden(again.model, inputs("bert", 3)), expected, atol=1e-12)
    with pytest.raises(ValueError, match="lora_alpha=5 for a model with 6"):
        LoRA(rank=3).attach(small("bert")).load(tmp_path / "theirs")


def test_foreign_files_change_nothing(tmp_path):
    tuned = LoRA(rank=3).attach(small("bert"))
    tuned.save(tmp_path)
    before = {key: value.clone() for key, value in tuned.state().items()}
    state = load_file(tmp_path / "adapter_model.safetensors")
    state["a stranger"] = state.pop(next(iter(state)))
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="a state that differs in"):
        tuned.load(tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in tuned.state().items())


@RENAMED
def test_sites_of_a_users_own_peft_model():
    config = peft.LoraConfig(r=2, target_modules=["query", "value"])
    model = peft.get_peft_model(small("bert"), config)
    names = [name for site in lora_sites(model) for name in site.names]
    assert sorted(names) == sorted(name for name, value in model.named_parameters() if value.requires_grad)
    config = peft.LoraConfig(r=2, target_modules=["query"], use_dora=True)
    with pytest.raises(ValueError, match="carries DoRA; expected plain LoRA"):
        lora_sites(peft.get_peft_model(small("bert"), config))


def test_a_second_pair_or_a_missing_part_is_refused():
    model = small("fused")
    LoRA(rank=2).attach(model)
    with pytest.raises(ValueError, match="a model with a tuner in place"):
        LoRA(rank=2).attach(model)
    with pytest.raises(ValueError, match="has no fused"):
        LoRA(rank=2, targets=("fused",)).attach(small("bert"))


def test_only_the_chosen_blocks_are_tuned():
    """Not those of a second model inside, whose names end alike."""
    model = small("fused")
    model.teacher = small("fused")
    tuned = LoRA(rank=2, layers=[0]).attach(model, anatomy(small("fused")))
    assert {name.split(".lora")[0] for name in tuned.named_parameters()} == {"blocks.0.attn.qkv"}


@RENAMED
def test_what_trains_beside_lora_is_refused():
    config = peft.LoraConfig(r=2, target_modules=["query"], bias="lora_only")
    with pytest.raises(ValueError, match=r"trains its own \['bias'\] beside LoRA"):
        lora_sites(peft.get_peft_model(small("bert"), config))
