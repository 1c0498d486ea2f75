"""How the images must look that a pretrained backbone takes."""

from dataclasses import dataclass

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """What a vision model was trained on.

    Attributes:
        size: edge of the square image, pixels.
        mean: of each channel, for pixels in [0, 1].
        std: likewise.
        crop_share: share of the resized shorter side that the central crop of an evaluation keeps.
    """

    size: int
    mean: Channels
    std: Channels
    crop_share: float = 1.0
