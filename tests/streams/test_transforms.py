"""Image transforms against hand computation and against Pillow; random ones from an explicit generator."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from forgetcast.streams.transforms import (
    CentreCrop,
    HorizontalFlip,
    Normalise,
    Pipeline,
    RandomCrop,
    Resize,
    evaluation_pipeline,
    training_pipeline,
)

MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)


def pictures(count=2, height=6, width=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bytes_of(floats):
    return (floats * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("size", [(32, 48), (7, 9), (20, 20)])
def test_resize_is_that_of_pillow(size):
    images = pictures(3, 20, 26)
    ours = bytes_of(Pipeline((Resize(size),))(images)).astype(int)
    for image, resized in zip(images, ours, strict=True):
        theirs = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(theirs - resized).max() <= 2  # Pillow also rounds to bytes between its two passes


def test_shorter_side_is_resized():
    assert Pipeline((Resize(10),))(pictures(1, 20, 27)).shape == (1, 3, 10, 13)
    assert Pipeline((Resize(10),))(pictures(1, 27, 20)).shape == (1, 3, 13, 10)


def test_centre_crop_and_normalise_by_hand():
    images = pictures(2, 7, 6)
    result = Pipeline((CentreCrop(4), Normalise(MEAN, STD)))(images)
    by_hand = (images[:, 1:5, 1:5] / 255 - np.array(MEAN)) / np.array(STD)
    assert result.dtype == torch.float32
    assert np.allclose(result.numpy(), by_hand.transpose(0, 3, 1, 2), atol=1e-6)


def test_random_crop_is_a_window_of_the_padded_image():
    images = pictures(40, 6, 5)
    crops = bytes_of(Pipeline((RandomCrop(4, padding=2),))(images, seeded()))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = set()
    for image, crop in zip(padded, crops, strict=True):
        windows = [p for p in np.ndindex(7, 6) if np.array_equal(image[p[0] : p[0] + 4, p[1] : p[1] + 4], crop)]
        assert len(windows) == 1
        places.add(windows[0])
    assert {top for top, _ in places} == set(range(7))
    assert {left for _, left in places} == set(range(6))


def test_flip_mirrors_whole_images():
    images = pictures(100)
    for probability, most in ((0.0, 0), (1.0, 100)):
        flipped = bytes_of(Pipeline((HorizontalFlip(probability),))(images, seeded()))
        assert sum(np.array_equal(a[:, ::-1], b) for a, b in zip(images, flipped, strict=True)) == most
    half = bytes_of(Pipeline((HorizontalFlip(),))(images, seeded()))
    mirrored = [np.array_equal(a[:, ::-1], b) for a, b in zip(images, half, strict=True)]
    kept = [np.array_equal(a, b) for a, b in zip(images, half, strict=True)]
    assert 25 < sum(mirrored) < 75
    assert sum(mirrored) + sum(kept) == 100


def test_generator_state_decides():
    pipeline, images, generator = training_pipeline(6, MEAN, STD, padding=2), pictures(8), seeded(3)
    first, later = pipeline(images, generator), pipeline(images, generator)
    assert torch.equal(first, pipeline(images, seeded(3)))
    assert not torch.equal(first, later)
    before = torch.get_rng_state()
    pipeline(images, generator)
    assert torch.equal(before, torch.get_rng_state())


def test_images_of_different_sizes():
    images = [pictures(1, 20, 30)[0], pictures(1, 9, 8, seed=1)[0]]
    pipeline = evaluation_pipeline(8, MEAN, STD)
    result = pipeline(images)
    assert result.shape == (2, 3, 8, 8)
    for image, one in zip(images, result, strict=True):
        assert torch.equal(pipeline(image[None])[0], one)
    assert training_pipeline(8, MEAN, STD)(images, seeded()).shape == (2, 3, 8, 8)


def test_record_and_hash():
    pipeline = evaluation_pipeline(224, MEAN, STD, crop_share=0.875)
    record = pipeline.record()
    assert record["steps"] == [
        {"step": "Resize", "size": 256},
        {"step": "CentreCrop", "size": 224},
        {"step": "Normalise", "mean": list(MEAN), "std": list(STD)},
    ]
    assert json.loads(json.dumps(record)) == record
    assert pipeline.hash == evaluation_pipeline(224, MEAN, STD, crop_share=0.875).hash
    assert pipeline.hash != evaluation_pipeline(224, MEAN, (0.5, 0.25, 0.9), crop_share=0.875).hash


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: training_pipeline(6, MEAN, STD)(pictures()),
            "without a generator; expected an explicit torch.Generator",
        ),
        (lambda: Pipeline((CentreCrop(7),))(pictures()), r"images of \(6, 6\) pixels; expected at least 7"),
        (lambda: Pipeline((Resize(4),))([pictures(1, 4, 4)[0], pictures(1, 4, 8)[0]]), "expected one size"),
        (lambda: Pipeline(())([]), "no image; expected at least one"),
        (lambda: Resize(0), "got size=0; expected an integer of at least 1"),
        (lambda: Normalise(MEAN, MEAN), "got std=0.0; expected a finite number above 0"),
        (lambda: HorizontalFlip(1.5), "got probability=1.5"),
    ],
)
def test_what_cannot_be_done_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
