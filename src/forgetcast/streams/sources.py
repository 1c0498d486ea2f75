"""Sources of labelled samples: the digits that ship with scikit-learn, and arrays in an `.npz` file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped
from sklearn.datasets import load_digits

from forgetcast.checks import complaint


@dataclass(frozen=True, eq=False)
class Source:
    """Labelled samples.

    Attributes:
        name: what reports call it.
        inputs: (n, ...) float32.
        labels: (n,) int64.
        test: indices of the samples that are set aside for testing, or None where the source makes no split.
    """

    name: str
    inputs: Shaped[np.ndarray, "..."]
    labels: Shaped[np.ndarray, "..."]
    test: Int[np.ndarray, " _"] | None = None

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels) or self.labels.ndim != 1 or len(self.labels) == 0:
            raise complaint(
                f"{self.name}: inputs of shape {self.inputs.shape} and labels of shape {self.labels.shape}",
                "inputs (n, ...) and labels (n,), n at least 1",
                "Give one label a sample.",
            )
        if not np.issubdtype(self.labels.dtype, np.integer):
            raise complaint(
                f"{self.name}: labels of type {self.labels.dtype}", "integer labels", "Convert: y.astype('int64')."
            )
        if not np.isfinite(self.inputs).all():
            raise complaint(
                f"{self.name}: inputs with NaN or infinity", "finite inputs", "Repair or drop those samples."
            )

    @property
    def hash(self) -> str:
        """SHA-256 of inputs and labels."""
        digest = hashlib.sha256(np.ascontiguousarray(self.inputs).tobytes())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        return f"sha256:{digest.hexdigest()}"


def digits() -> Source:
    """1,797 real 8 x 8 images of handwritten digits; shipped with scikit-learn, so nothing is downloaded."""
    inputs, labels = load_digits(return_X_y=True)
    return Source("digits", (inputs / 16).astype(np.float32), labels.astype(np.int64))


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
    scale = 255 if inputs.dtype == np.uint8 else 1
    return Source(path.stem, inputs.astype(np.float32) / scale, labels, test)
