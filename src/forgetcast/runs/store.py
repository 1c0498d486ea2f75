"""Runs on disk, a directory each: `recipe.yaml`, `record.json`, `metrics.jsonl`, `checkpoints/`, `report.html`."""

from pathlib import Path

from forgetcast.checks import complaint
from forgetcast.runs.keys import to_yaml
from forgetcast.runs.listing import Run as Run
from forgetcast.runs.listing import list_runs as list_runs
from forgetcast.runs.listing import read_tree
from forgetcast.runs.recipe import Recipe, build_recipe
from forgetcast.runs.record import write_whole


def run_folder(root: Path, recipe: Recipe) -> Path:
    """Where a recipe's run is under `root`: name, seed and start of the hash."""
    digest = recipe.hash.removeprefix("sha256:")
    return root / f"{recipe.name}-seed{recipe.seed}-{digest[:8]}"


def open_run(root: Path, recipe: Recipe) -> Path:
    """The directory of a recipe's run under `root`, made if it is not there.

    Raises:
        ValueError: another recipe in that directory, or one that cannot be read.
    """
    folder = run_folder(root, recipe)
    written = folder / "recipe.yaml"
    if not written.exists():
        write_whole(to_yaml(recipe.dump()), written)
    elif build_recipe(read_tree(written)).hash != recipe.hash:
        raise complaint(
            f"{folder} holds another recipe", f"the recipe {recipe.hash}", "Choose another root, or move that run away."
        )
    (folder / "checkpoints").mkdir(exist_ok=True)
    return folder
