"""The transformer with random weights: drawn from the seed, of the size it says, and telling images apart."""

import pytest
import torch

from forgetcast.backbones.drawn import drawn_vit
from forgetcast.runs.inputs import inputs_of
from forgetcast.runs.sections import PreprocessingChoice
from forgetcast.streams.sources import digit_images, digits


def drawn(seed, width=64):
    torch.manual_seed(seed)
    return drawn_vit(width)


def test_it_is_frozen_and_drawn_from_the_seed():
    first, again, other = drawn(0), drawn(0), drawn(1)
    assert not first.module.training
    assert not any(parameter.requires_grad for parameter in first.module.parameters())
    for one, same, different in zip(
        *(model.module.state_dict().values() for model in (first, again, other)), strict=True
    ):
        assert one.equal(same)
        assert one.unique().numel() == 1 or not one.equal(different)  # biases, and scales of normalisations


@pytest.mark.parametrize("width", [32, 64])
def test_features_of_digits_have_its_width_and_tell_them_apart(width):
    source = digit_images()
    model = drawn(0, width)
    read = inputs_of(source, PreprocessingChoice(), model).read
    images = read(torch.arange(200).numpy())
    assert images.shape == (200, 3, 8, 8)
    features = model.module(images)
    assert features.shape == (200, width)
    centred = features - features.mean(0)
    assert centred.norm() > 0.25 * features.norm()  # with weights of the usual 0.02 it is a tenth


def test_the_images_are_the_digits():
    images, plain = digit_images(), digits()
    assert (images.labels == plain.labels).all()
    for channel in range(3):
        assert images.inputs[..., channel].reshape(-1, 64) / 255 == pytest.approx(plain.inputs, abs=0.002)


@pytest.mark.parametrize("width", [2, 30])
def test_a_width_that_heads_do_not_divide_is_refused(width):
    with pytest.raises(ValueError, match=f"got width={width} .*; expected a multiple of 4"):
        drawn_vit(width)
