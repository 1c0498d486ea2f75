"""timm models as backbones, against a stub of `timm.create_model`: timm needs torchvision, which tests do without."""

import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from forgetcast.backbones.preprocessing import Preprocessing
from forgetcast.backbones.timm import timm_backbone

CONFIG = {
    "input_size": (3, 8, 8),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.1),
    "crop_pct": 0.9,
    "classifier": "head",
}


class Stub(nn.Module):
    """As timm makes models: without a classifier for `num_classes=0`."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(3 * 8 * 8, 5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, num_classes) if num_classes else nn.Identity()
        self.pretrained_cfg = CONFIG

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.body(images.flatten(1))))


@pytest.fixture
def calls(monkeypatch):
    calls = []

    def create_model(name, pretrained=False, pretrained_cfg_overlay=None, *, num_classes=1000):
        calls.append({"name": name, "pretrained": pretrained, "overlay": pretrained_cfg_overlay})
        if name != "stub":
            raise RuntimeError(f"Unknown model ({name})")
        torch.manual_seed(0)
        return Stub(num_classes)

    module = ModuleType("timm")
    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    return calls


def test_pretrained_weights_are_asked_for_as_safetensors_alone(calls):
    pretrained = timm_backbone("stub")
    assert calls == [
        {"name": "stub", "pretrained": True, "overlay": {"hf_hub_filename": "model.safetensors", "url": ""}}
    ]
    assert pretrained.preprocessing() == Preprocessing(8, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), 0.9)
    assert pretrained.tokenizer is None
    assert not pretrained.module.training
    assert not any(parameter.requires_grad for parameter in pretrained.module.parameters())
    assert pretrained.module(torch.zeros(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("classes", [0, 7])
def test_local_weights_with_and_without_their_classifier(calls, tmp_path, suffix, classes):
    state = {name: value + 1 for name, value in Stub(classes).state_dict().items()}
    path = tmp_path / f"weights.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    model = timm_backbone("stub", path).module
    assert calls[0]["pretrained"] is False
    assert torch.equal(model.body.weight, state["body.weight"])


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_weights_that_do_not_fit_are_refused(calls, tmp_path, capsys):
    other, pickled, broken = (tmp_path / name for name in ("other.safetensors", "evil.pth", "broken.safetensors"))
    save_file({"trunk.weight": torch.zeros(2)}, other)
    torch.save({"body.weight": Evil()}, pickled)
    broken.write_bytes(b"nothing")
    for path, message in (
        (other, r"lack \['body.weight', 'body.bias'\] and bring \['trunk.weight'\]; expected the parameters of this"),
        (pickled, r"\(it holds more than tensors\); expected a state dict of this model"),
        (broken, "cannot load the weights"),
        (tmp_path / "nothing.pth", "cannot load the weights"),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            timm_backbone("stub", path)
    assert "unpickled" not in capsys.readouterr().out


def test_unknown_models_and_missing_preprocessing(calls, monkeypatch):
    with pytest.raises(
        ValueError, match=r"cannot load timm:stab \(Unknown model \(stab\)\); expected a model that timm"
    ):
        timm_backbone("stab")
    monkeypatch.setitem(CONFIG, "mean", None)
    with pytest.raises(ValueError, match="timm:stub does not say how its images must look .*Give preprocessing.size"):
        timm_backbone("stub").preprocessing()


def test_a_timm_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"cannot import timm \(ModuleNotFoundError.*pip install 'forgetcast\[timm\]'"):
        timm_backbone("stub")


def test_a_torchvision_that_does_not_fit(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match="torchvision::nms does not exist.*expected timm, and the torchvision it needs"
    ):
        timm_backbone("stub")
    sys.modules.pop("timm", None)
