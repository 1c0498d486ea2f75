"""A small vision transformer with random weights: what methods that need blocks run on where nothing is downloaded."""

from forgetcast.backbones.huggingface import Pooling, as_backbone
from forgetcast.backbones.preprocessing import Preprocessing
from forgetcast.backbones.pretrained import Pretrained
from forgetcast.checks import complaint, require_module

WIDTH, HEADS, BLOCKS, EDGE, PATCH = 64, 4, 2, 8, 2


def drawn_vit(width: int = WIDTH, *, pooling: Pooling | None = None) -> Pretrained:
    """A transformer of two blocks for images of 8 x 8 pixels in patches of 2 x 2, frozen, in evaluation mode.

    Its weights have standard deviation width^-1/2, so that tokens keep their size and differ from image to image;
    with the usual 0.02 the class token would be nearly the same for all of them.

    Args:
        width: of its features, a multiple of 4, its number of heads.
        pooling: the class token by default.

    Raises:
        ValueError: transformers is not installed, another width.
    """
    transformers = require_module("transformers", "huggingface")
    if width < HEADS or width % HEADS:
        raise complaint(f"got width={width} of a drawn transformer", f"a multiple of {HEADS}", "Round it.")
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        intermediate_size=2 * width,
        image_size=EDGE,
        patch_size=PATCH,
        initializer_range=width**-0.5,
    )
    backbone = as_backbone(transformers.ViTModel(config, add_pooling_layer=False), pooling)
    middle = (0.5, 0.5, 0.5)
    return Pretrained(backbone, backbone.model, lambda: Preprocessing(EDGE, middle, middle))
