"""All that a recipe names, made and put together: stream, backbone, method, and the loop that is to run over them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from forgetcast.checks import complaint
from forgetcast.heads.base import Head
from forgetcast.heads.cosine import Cosine
from forgetcast.heads.linear import Linear
from forgetcast.learn.loop import Checkpointing, learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.learn.progress import Learnt, Step
from forgetcast.learn.seeding import seed_everything
from forgetcast.methods.base import Method
from forgetcast.methods.registry import create, method_class
from forgetcast.protect.placement import Placement
from forgetcast.runs.bar import counting_bar
from forgetcast.runs.data import stream_of
from forgetcast.runs.options import takes_model
from forgetcast.runs.prepare import Prepared, prepare
from forgetcast.runs.recipe import Recipe
from forgetcast.runs.section import plain
from forgetcast.runs.store import open_run
from forgetcast.streams.scenarios import Stream

HEADS: dict[str, type[Head]] = {"linear": Linear, "cosine": Cosine}
FEATURES = "features"
PRECISIONS = {"float32": "no", "bfloat16": "bf16"}


@dataclass(frozen=True, eq=False)
class Assembly:
    """A recipe's run, before anything has trained in this process.

    Attributes:
        recipe: all that decides the numbers.
        folder: the run's directory.
        stream: the tasks.
        prepared: backbone and inputs.
        method: what learns.
        accelerator: where it does.
        screen: for progress bars; None in all processes but one.
    """

    recipe: Recipe
    folder: Path
    stream: Stream
    prepared: Prepared
    method: Method
    accelerator: Accelerator
    screen: Console | None

    @property
    def optimization(self) -> Optimization:
        """The recipe's training, as the loop takes it."""
        return Optimization(**self.recipe.training.optimization)

    @property
    def checkpoints(self) -> Path:
        """Where the run is saved."""
        return self.folder / "checkpoints"

    @property
    def identity(self) -> dict[str, Any]:
        """What the numbers of this run are of, as records say it."""
        recipe, stream = self.recipe, self.stream
        return {
            "name": recipe.name,
            "recipe": recipe.dump(),
            "recipe_hash": recipe.hash,
            "seed": recipe.seed,
            "source": {"name": stream.source.name, "samples": len(stream.source), "hash": stream.source.hash},
            "class_order": list(stream.class_order),
            "split_hash": stream.split_hash,
            **self.prepared.record,
        }

    def learn(
        self,
        *,
        until: int | None = None,
        on_event: Callable[[Mapping[str, Any]], None] = lambda _: None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Learnt:
        """Run the loop, or go on with it, to the end or to the end of so many tasks; see `forgetcast.learn.loop`."""
        recipe = self.recipe
        return learn(
            self.method,
            self.stream,
            self.optimization,
            seed=recipe.seed,
            read=self.prepared.read,
            read_training=self.prepared.read_training,
            checkpointing=Checkpointing(
                self.checkpoints, minutes=recipe.checkpoint.minutes, keep=recipe.checkpoint.keep
            ),
            accelerator=self.accelerator,
            evaluate_every=recipe.training.evaluate_every,
            until=until,
            on_event=on_event,
            on_step=on_step,
        )


def assemble(recipe: Recipe, root: Path, accelerator: Accelerator, console: Console | None = None) -> Assembly:
    """Make all that a recipe names, and the directory of its run.

    Args:
        recipe: all that decides the numbers.
        root: the directory that holds the runs; features that are kept go into its folder `features`.
        accelerator: of the recipe's precision.
        console: for progress bars.

    Raises:
        ValueError: whatever source, stream, backbone and method refuse; another recipe in that directory.
    """
    stream = stream_of(recipe.data, recipe.seed)
    seed_everything(recipe.seed)
    screen = (console or Console(stderr=True)) if accelerator.is_main_process else None
    with accelerator.main_process_first(), counting_bar(screen, "features", len(stream.source)) as on_batch:
        prepared = prepare(recipe, stream.source, root / FEATURES, device=accelerator.device, on_batch=on_batch)
        folder = open_run(root, recipe)
    options: dict[str, Any] = dict(recipe.method.options)
    if "seed" in signature(method_class(recipe.method.name)).parameters:
        options["seed"] = recipe.seed
    method = create(recipe.method.name, prepared.backbone, prepared.width, **options)
    _require_trained(recipe, method)
    if takes_model(recipe.method.name):
        method.model.head = HEADS[recipe.model.head](prepared.width)
        if recipe.model.new_rows == "placed":
            method.protections = (Placement(), *method.protections)
    return Assembly(recipe, folder, stream, prepared, method, accelerator, screen)


def _require_trained(recipe: Recipe, method: Method) -> None:
    """Raise if the recipe says that the backbone trains, and the method keeps it frozen."""
    trains = any(parameter.requires_grad for parameter in method.model.backbone.parameters())
    key = "trainable" if recipe.model.tuner is None else "tuner"
    if (recipe.model.tuner is not None or recipe.model.trainable not in (None, "none")) and not trains:
        value = plain(getattr(recipe.model, key))
        raise complaint(
            f"got model.{key}={value!r} with {recipe.method.name}, which freezes the backbone",
            "a method that trains it",
            f"Leave model.{key} out, or choose another method.",
        )
