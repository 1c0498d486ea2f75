"""The sections of a recipe beside `data`: model, preprocessing, method, training, checkpoint."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from forgetcast.backbones.huggingface import Pooling
from forgetcast.checks import complaint, require_choice
from forgetcast.learn.optimizer import Schedule
from forgetcast.runs.options import check_options
from forgetcast.runs.section import AboveZero, AtLeastZero, Count, Probability, Section
from forgetcast.runs.tuner import TunerChoice
from forgetcast.streams.resized_crop import Interpolation, RandomResizedCrop

PRETRAINED = ("hf", "timm")
TRANSFORMERS = (*PRETRAINED, "vit")
BACKBONES = ("identity", "mlp", *TRANSFORMERS)
SIZED = ("mlp", "vit")
AUGMENTATIONS = ("random_crop", "resized_crop", "flip")


def _check_trainable(value: Any) -> Any:
    patterns = isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(one, str) for one in value)
    if value is not None and not patterns:
        if not isinstance(value, str):
            raise complaint(
                f"got model.trainable={value!r}",
                "none, all, or a list of patterns of parameter names",
                "Write for example [encoder.layer.11.*].",
            )
        require_choice("model.trainable", value, ("none", "all"))
    return tuple(value) if patterns else value  # a list is what YAML can say


class ModelChoice(Section):
    """Backbone and head.

    Attributes:
        backbone: "identity" (the inputs, flattened), "mlp" or "mlp:WIDTH" (one hidden ReLU layer, drawn from the seed),
            "vit" or "vit:WIDTH" (a small vision transformer, drawn from the seed), "hf:NAME" (a Hugging Face model by
            name or directory) or "timm:NAME".
        weights: file with the weights of a timm model; those of the hub by default.
        pooling: how the last hidden states of a Hugging Face model become a feature; by default as the model was made.
        trainable: which parameters of the backbone train: none of them, all that the features depend on, or those
            whose names match a pattern. By default all of an mlp and none of a transformer.
        tuner: small parts put into a frozen transformer; they train, and it does not.
        cache: whether features are computed once and kept on disk; by default where a pretrained backbone is frozen
            and no image is augmented.
        head: kind of head.
        new_rows: how the head's rows of new classes start.
    """

    backbone: str = "identity"
    weights: str | None = None
    pooling: Pooling | None = None
    trainable: Annotated[Literal["none", "all"] | tuple[str, ...] | None, BeforeValidator(_check_trainable)] = None
    tuner: TunerChoice | None = None
    cache: bool | None = None
    head: Literal["linear", "cosine"] = "linear"
    new_rows: Literal["fresh", "placed"] = "fresh"

    @property
    def kind(self) -> str:
        """What stands before the colon of `backbone`."""
        return self.backbone.partition(":")[0]

    @property
    def argument(self) -> str:
        """What stands after the colon of `backbone`."""
        return self.backbone.partition(":")[2]

    @model_validator(mode="after")
    def _possible(self) -> "ModelChoice":
        require_choice("model.backbone", self.kind, BACKBONES)
        given = f"got model.backbone={self.backbone!r}"
        if self.kind in PRETRAINED and not self.argument:
            raise complaint(given, f"{self.kind}:NAME", "Add the name of a model.")
        if self.kind == "identity" and self.argument:
            raise complaint(given, "identity", "Leave out what follows it.")
        sized = self.argument.isdecimal() and int(self.argument) > 0
        if self.kind in SIZED and ":" in self.backbone and not sized:
            raise complaint(given, f"{self.kind}, or {self.kind}:WIDTH", f"Give a width such as {self.kind}:128.")
        if self.kind not in ("hf", "vit"):
            self.refuse_set("model", ("pooling",), f"{self.kind} has no tokens to pool")
        if self.kind != "timm":
            self.refuse_set("model", ("weights",), "only timm:NAME reads them from a file")
        if self.kind == "identity":
            self.refuse_set("model", ("trainable", "cache"), "identity has nothing to train and nothing to compute")
        if self.tuner is not None:
            if self.kind not in TRANSFORMERS:
                self.refuse_set("model", ("tuner",), f"{self.kind} is no pretrained transformer")
            self.refuse_set("model", ("trainable",), "with a tuner the backbone itself stays frozen")
        return self


class ResizedCrop(Section):
    """A random part of each training image, resized; keys as the arguments of `RandomResizedCrop`."""

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"

    @model_validator(mode="after")
    def _possible(self) -> "ResizedCrop":
        RandomResizedCrop(1, **dict(self))
        return self


class PreprocessingChoice(Section):
    """How samples become what the backbone takes.

    Attributes:
        size: edge of the square image, pixels; the pretrained backbone's own by default.
        normalise: whether channels are normalised; False leaves pixels in [0, 1].
        mean: of each channel, for pixels in [0, 1]; likewise.
        std: of each channel; likewise.
        crop_share: share of the resized shorter side that the central crop keeps; likewise.
        random_crop: whether training images are cropped at random places.
        padding: black pixels on every side before the random crop.
        resized_crop: instead of it: parts of training images of random area, ratio and place, resized.
        flip: the probability with which a training image is mirrored.
        max_length: tokens of a text; longer ones are cut.
    """

    size: Count | None = None
    normalise: bool = True
    mean: tuple[float, float, float] | None = None
    std: tuple[AboveZero, AboveZero, AboveZero] | None = None
    crop_share: Annotated[float, Field(gt=0, le=1)] | None = None
    random_crop: bool = False
    padding: Annotated[int, Field(ge=0)] = 0
    resized_crop: ResizedCrop | None = None
    flip: Probability = 0.0
    max_length: Count = 128

    @property
    def augments(self) -> bool:
        """Whether training images are changed at random."""
        return self.random_crop or self.resized_crop is not None or self.flip > 0

    @model_validator(mode="after")
    def _possible(self) -> "PreprocessingChoice":
        if (self.mean is None) != (self.std is None):
            raise complaint("got one of preprocessing.mean and preprocessing.std", "both or neither", "Give both.")
        if not self.random_crop:
            self.refuse_set("preprocessing", ("padding",), "it belongs to random_crop")
        if self.random_crop:
            self.refuse_set("preprocessing", ("resized_crop",), "random_crop is another way to crop the same images")
        if not self.normalise:
            self.refuse_set("preprocessing", ("mean", "std"), "preprocessing.normalise is false")
        return self


class MethodChoice(Section):
    """A method by its name; every other key is an option of its constructor."""

    model_config = ConfigDict(extra="allow")

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """What the constructor is given beyond the model and its protections."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> "MethodChoice":
        check_options(self.name, self.options)
        return self


class Training(Section):
    """How a method that learns by gradient is trained on each task.

    Attributes:
        precision: in which the loss is computed; weights, optimiser and evaluation stay in float32.
        evaluate_every: also evaluate all tasks seen after so many steps within a task, for the average anytime
            accuracy.
    """

    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: AboveZero = 0.001
    epochs: Count = 1
    batch_size: Count = 64
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: AtLeastZero = 0.0
    max_gradient_norm: AboveZero | None = None
    schedule: Schedule = "constant"
    precision: Literal["float32", "bfloat16"] = "float32"
    evaluate_every: Count | None = None

    @property
    def optimization(self) -> dict[str, Any]:
        """The arguments of `forgetcast.learn.optimizer.Optimization`; the other keys are the loop's own."""
        return self.model_dump(exclude={"precision", "evaluate_every"})

    @model_validator(mode="after")
    def _possible(self) -> "Training":
        if self.optimizer != "sgd":
            self.refuse_set("training", ("momentum",), f"{self.optimizer} has none to set; it belongs to sgd")
        return self


class Checkpoint(Section):
    """How often a run is saved, in minutes, and how many saved states are kept."""

    minutes: AboveZero = 10.0
    keep: Count = 2
