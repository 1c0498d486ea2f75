"""Sources of labelled samples: features, images or texts behind one index, so that tasks are arrays of indices."""

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int, Shaped, UInt8
from PIL import Image
from sklearn.datasets import load_digits

from forgetcast.checks import complaint, require_choice

Kind = Literal["features", "images", "texts"]
Samples = Shaped[np.ndarray, "n ..."] | list[str] | list[UInt8[np.ndarray, "_ _ 3"]]


@dataclass(frozen=True, eq=False)
class Source:
    """Labelled samples; sample i is `inputs[i]` with `labels[i]`.

    Attributes:
        name: what reports call it.
        inputs: features (n, ...) of numbers; images (n, h, w, 3) of bytes, or (n,) image files that are decoded when
            they are taken: paths (str) or the encoded files themselves (bytes); texts (n,) of str.
        labels: (n,) integers.
        test: indices of the samples that are set aside for testing, or None where the source makes no split.
        kind: what the inputs are.
        class_names: the name of label c is `class_names[c]`; None where labels have no names.
    """

    name: str
    inputs: Shaped[np.ndarray, "..."]
    labels: Shaped[np.ndarray, "..."]
    test: Int[np.ndarray, " _"] | None = None
    kind: Kind = "features"
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, get_args(Kind))
        if self.inputs.ndim == 0 or self.labels.shape != self.inputs.shape[:1] or len(self.labels) == 0:
            raise complaint(
                f"{self.name}: inputs of shape {self.inputs.shape} and labels of shape {self.labels.shape}",
                "inputs (n, ...) and labels (n,), n at least 1",
                "Give one label a sample.",
            )
        self._check_labels()
        self._check_inputs()
        if self.test is not None and not _are_indices(self.test, len(self)):
            raise complaint(
                f"{self.name}: test indices {self.test}", f"distinct indices below {len(self)}", "Correct the split."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Int[np.ndarray, " n"] | Sequence[int]) -> Samples:
        """The inputs of some samples, in the order of `indices`.

        Returns:
            Features (n, ...), images (n, h, w, 3), a list of n texts, or, for image files (whose sizes may differ), a
            list of n images (h, w, 3) of bytes.

        Raises:
            ValueError: a file that is not an image.
        """
        taken = self.inputs[np.asarray(indices, dtype=np.int64)]
        if self.kind == "texts":
            return [str(text) for text in taken]
        if self.kind == "images" and taken.ndim == 1:
            return [read_image(file) for file in taken]
        return taken

    @property
    def hash(self) -> str:
        """SHA-256 of inputs and labels. Of image files, it is the content that counts: each is read once."""
        if self.inputs.ndim == 1 and self.inputs.dtype.kind in "OU":
            digest = hashlib.sha256()
            for item in self.inputs:
                content = item if isinstance(item, bytes) else str(item).encode()
                if self.kind == "images" and not isinstance(item, bytes):
                    content = Path(item).read_bytes()
                digest.update(hashlib.sha256(content).digest())
        else:
            digest = hashlib.sha256(np.ascontiguousarray(self.inputs).tobytes())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        return f"sha256:{digest.hexdigest()}"

    def _check_labels(self) -> None:
        if not np.issubdtype(self.labels.dtype, np.integer):
            raise complaint(
                f"{self.name}: labels of type {self.labels.dtype}", "integer labels", "Convert: y.astype('int64')."
            )
        if self.class_names is not None and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise complaint(
                f"{self.name}: labels from {self.labels.min()} to {self.labels.max()}",
                f"labels from 0 to {len(self.class_names) - 1}, one for each of the class names",
                "Drop samples without a class, or complete the names.",
            )

    def _check_inputs(self) -> None:
        shape, kind = self.inputs.shape, self.inputs.dtype.kind
        if self.kind == "features":
            if kind not in "biuf":
                raise complaint(
                    f"{self.name}: features of type {self.inputs.dtype}",
                    "numbers",
                    "Convert them, or say kind='texts' or kind='images'.",
                )
            if not np.isfinite(self.inputs).all():
                raise complaint(
                    f"{self.name}: inputs with NaN or infinity", "finite inputs", "Repair or drop those samples."
                )
            return
        files = (str, bytes) if self.kind == "images" else str
        fits = len(shape) == 1 and (kind == "U" or (kind == "O" and all(isinstance(i, files) for i in self.inputs)))
        if self.kind == "images":
            fits = fits or (self.inputs.dtype == np.uint8 and len(shape) == 4 and shape[3] == 3)
        if not fits:
            wanted = {"texts": "(n,) of str", "images": "(n, h, w, 3) of uint8, or (n,) image files"}[self.kind]
            raise complaint(
                f"{self.name}: {self.kind} of shape {shape} and type {self.inputs.dtype}", wanted, "Convert the inputs."
            )


def read_image(file: str | bytes) -> UInt8[np.ndarray, "_ _ 3"]:
    """Decode one image file, given by its path or by its bytes, to RGB.

    Raises:
        ValueError: not a readable image.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return np.array(image.convert("RGB"))
    except OSError as error:
        place = f"{len(file)} bytes" if isinstance(file, bytes) else file
        raise complaint(
            f"cannot read {place} ({error})", "an image that Pillow reads", "Repair or remove it."
        ) from error


def digits() -> Source:
    """1,797 real 8 x 8 images of handwritten digits; shipped with scikit-learn, so nothing is downloaded."""
    inputs, labels = load_digits(return_X_y=True)
    return Source("digits", (inputs / 16).astype(np.float32), labels.astype(np.int64))


def digit_images() -> Source:
    """The same digits as grey images (n, 8, 8, 3) of bytes, for backbones that take images."""
    plain = digits()
    grey = (255 * plain.inputs).round().astype(np.uint8).reshape(-1, 8, 8, 1)
    return Source("digit_images", grey.repeat(3, axis=3), plain.labels, kind="images")


def npz(path: Path) -> Source:
    """Arrays `x`, `y`, or `x_train`, `y_train`, `x_test`, `y_test`, of an `.npz` file. Nothing in it is unpickled.

    Bytes are scaled to [0, 1].

    Raises:
        ValueError: no such file, not an archive of arrays, other names, arrays that do not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name.lower(): archive[name] for name in archive.files}
    except (OSError, ValueError, AttributeError) as error:
        raise complaint(
            f"cannot read {path} ({error})",
            "an .npz file of plain arrays",
            "Write one with numpy.savez(path, x=x, y=y).",
        ) from error
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        inputs = np.concatenate([arrays["x_train"], arrays["x_test"]])
        labels = np.concatenate([arrays["y_train"], arrays["y_test"]])
        test = np.arange(len(arrays["x_train"]), len(inputs))
    elif {"x", "y"} <= arrays.keys():
        inputs, labels, test = arrays["x"], arrays["y"], None
    else:
        raise complaint(
            f"{path} holds {sorted(arrays)}",
            "x and y, or x_train, y_train, x_test and y_test",
            "Rename the arrays: numpy.savez(path, x=x, y=y).",
        )
    return Source(path.stem, _as_features(inputs), labels, test)


def arrays(
    x: Shaped[np.ndarray, "..."] | Sequence[str],
    y: Shaped[np.ndarray, "..."] | Sequence[int] | Sequence[str],
    x_test: Shaped[np.ndarray, "..."] | Sequence[str] | None = None,
    y_test: Shaped[np.ndarray, "..."] | Sequence[int] | Sequence[str] | None = None,
    *,
    name: str = "arrays",
) -> Source:
    """Samples in memory: bytes (n, h, w, 3) are images, strings are texts, anything else features (float32).

    Args:
        x: (n, ...) inputs; other bytes than images are scaled to [0, 1].
        y: (n,) labels: integers, or strings, which are numbered in sorted order.
        x_test: inputs that are set aside for testing; given together with `y_test`.
        y_test: their labels.
        name: what reports call it.

    Raises:
        ValueError: one of `x_test` and `y_test` without the other, arrays that do not fit.
    """
    if (x_test is None) != (y_test is None):
        raise complaint(f"{name}: one of x_test and y_test is missing", "both or neither", "Give both.")
    inputs, values, test = _plain(x), list(np.asarray(y).tolist()), None
    if x_test is not None and y_test is not None:
        held_out = _plain(x_test)
        if held_out.shape[1:] != inputs.shape[1:] or held_out.dtype != inputs.dtype:
            raise complaint(
                f"{name}: x {inputs.shape} {inputs.dtype} and x_test {held_out.shape} {held_out.dtype}",
                "samples of one shape and type",
                "Convert one of the two.",
            )
        test = np.arange(len(inputs), len(inputs) + len(held_out))
        inputs, values = np.concatenate([inputs, held_out]), values + list(np.asarray(y_test).tolist())
    labels, class_names = numbered(values)
    kind: Kind = "features"
    if inputs.dtype == object:
        kind = "texts"
    elif inputs.dtype == np.uint8 and inputs.ndim == 4 and inputs.shape[3] == 3:
        kind = "images"
    else:
        inputs = _as_features(inputs)
    return Source(name, inputs, labels, test, kind, class_names)


def numbered(values: Sequence[Any]) -> tuple[Int[np.ndarray, " n"], tuple[str, ...] | None]:
    """Labels as integers: whole numbers (also written as text) stay, names are numbered in sorted order.

    Returns:
        (n,) int64 and the sorted names, or None where the labels were numbers.

    Raises:
        ValueError: a missing label, or one that is neither a whole number nor text.
    """
    for place, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise complaint(
                f"label {value!r} of sample {place}", "a whole number or a name", "Repair or drop that sample."
            )
    # 007 is a name, not a number: as a number it could not be told from 7.
    if all(re.fullmatch(r"0|-?[1-9]\d*", str(value)) for value in values):
        return np.array([int(value) for value in values], dtype=np.int64), None
    names = sorted({str(value) for value in values})
    place_of = {name: place for place, name in enumerate(names)}
    return np.array([place_of[str(value)] for value in values], dtype=np.int64), tuple(names)


def _plain(x: Any) -> Shaped[np.ndarray, "..."]:
    array = np.asarray(x)
    return array.astype(object) if array.dtype.kind == "U" else array


def _as_features(inputs: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    if inputs.dtype.kind not in "biuf":
        return inputs
    return inputs.astype(np.float32) / (255 if inputs.dtype == np.uint8 else 1)


def _are_indices(indices: Int[np.ndarray, " _"], size: int) -> bool:
    inside = len(indices) == 0 or (indices.min() >= 0 and indices.max() < size)
    return bool(inside and len(np.unique(indices)) == len(indices))
