"""Runs found again: what the directories under a root hold, damaged ones included. Imports no PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetcast.checks import complaint
from forgetcast.runs.keys import did_you_mean, flatten, parse_assignment, parse_yaml
from forgetcast.runs.record import read_record


@dataclass(frozen=True, eq=False)
class Run:
    """One run directory, as far as it can be read.

    Attributes:
        folder: the directory.
        record: its record; empty while there is none, and where it is damaged.
        recipe: of the record, or else of `recipe.yaml`; empty if neither can be read.
        state: "finished", "running" or "damaged".
        problem: what is damaged, if anything is.
    """

    folder: Path
    record: dict[str, Any]
    recipe: dict[str, Any]
    state: str
    problem: str | None = None

    @property
    def keys(self) -> dict[str, Any]:
        """What filters see: the recipe by its dotted keys, and `state`."""
        return flatten(self.recipe) | {"state": self.state}


def list_runs(root: Path, filters: Sequence[str] = ()) -> list[Run]:
    """The runs directly under `root`, by name of their directory.

    Args:
        root: the directory that holds them.
        filters: `key=value` with dotted keys of the recipe, or `state=...`; a run must meet all. A damaged run whose
            recipe cannot be read either is always listed: nobody can say that it is not meant.

    Raises:
        ValueError: no such directory, a filter that is no `key=value`, a key that no run has.
    """
    if not root.is_dir():
        raise complaint(f"{root} is no directory", "the directory that holds the runs", "Correct the path.")
    wanted = [parse_assignment(text) for text in filters]
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
    runs = [_read_run(folder) for folder in folders if _holds_run(folder)]
    known = {key for run in runs for key in run.keys}
    for key, _ in wanted:
        if runs and key not in known:
            raise complaint(f"no run has the key {key}", f"one of {sorted(known)}", did_you_mean(key, sorted(known)))
    return [run for run in runs if _meets(run, wanted)]


def _meets(run: Run, wanted: Sequence[tuple[str, Any]]) -> bool:
    if not run.recipe and run.state == "damaged":
        return True
    return all(key in run.keys and run.keys[key] == value for key, value in wanted)


def _holds_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").exists() or (folder / "record.json").exists()


def _read_run(folder: Path) -> Run:
    problems = []
    record: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    if (folder / "record.json").exists():
        try:
            record = read_record(folder)
            recipe = _mapping(record.get("recipe", {}), "the recipe of its record")
            _mapping(record.get("metrics", {}), "the metrics of its record")
        except ValueError as error:
            problems.append(str(error))
            record = {}
    if not recipe and (folder / "recipe.yaml").exists():
        try:
            recipe = read_tree(folder / "recipe.yaml")
        except ValueError as error:
            problems.append(str(error))
    if problems:
        return Run(folder, record, recipe, "damaged", " ".join(problems))
    return Run(folder, record, recipe, str(record.get("state", "finished" if record else "running")))


def read_tree(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ValueError: a file that cannot be read, or that holds anything else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise complaint(f"cannot read {path} ({error})", "a recipe in YAML", "Correct or remove it.") from error
    return _mapping(parse_yaml(text, str(path)), str(path))


def _mapping(value: Any, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise complaint(f"{origin} is a {type(value).__name__}", "keys and values", "Write it again.")
    return value
