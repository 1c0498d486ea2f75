"""The metrics of Avalanche and Continuum, called on an accuracy matrix through their own code.

Of each only the source files of its metrics are loaded: importing the packages would import torchvision. Run as a
script this writes `peer_numbers.json`, with which the comparison runs where they are not installed:

    pip install --no-deps --target FOLDER avalanche-lib continuum
    PYTHONPATH=FOLDER python tests/metrics/peers.py
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

import numpy as np

NUMBERS = Path(__file__).with_name("peer_numbers.json")
SAMPLES = 40  # of each task: accuracies are multiples of 1 / SAMPLES

Square = list[list[float]]
Numbers = dict[str, float]


def missing(package: str) -> str | None:
    """Why a package cannot be compared with, if it cannot."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def continuum(a: Square, baseline: list[float]) -> Numbers:
    """What Continuum makes of predictions that have these accuracies, under the names of our definitions."""
    metrics = _file("continuum", "metrics/metrics.py")
    tasks = np.repeat(np.arange(len(a)), SAMPLES)
    targets = np.ones(len(tasks), dtype=np.int64)
    right = [[np.arange(SAMPLES) < round(share * SAMPLES) for share in row] for row in a]
    predictions = [np.concatenate(row).astype(np.int64) for row in right]
    given = (predictions, [targets] * len(a), [tasks] * len(a))
    return {
        "triangular_accuracy": float(metrics.accuracy_A(*given)),
        "libcontinual_backward_transfer": float(metrics.backward_transfer(*given)),
        "continuum_forgetting": float(metrics.forgetting(*given)),
    }


def avalanche(a: Square, baseline: list[float]) -> Numbers:
    """What Avalanche's standalone metrics make of these accuracies, under the names of our definitions."""
    with_stubs = {"forgetting_bwt": "Forgetting", "forward_transfer": "ForwardTransfer"}
    forgetting, transfer = (
        getattr(_file("avalanche", f"evaluation/metrics/{name}.py", _avalanche_stubs), kind)()
        for name, kind in with_stubs.items()
    )
    for task, row in enumerate(a):
        for other, value in enumerate(row[:task]):
            forgetting.update(other, value)
        forgetting.update(task, row[task], initial=True)
    for task, value in enumerate(baseline):
        transfer.update(task, value, initial=True)
    for task in range(1, len(a)):
        transfer.update(task, a[task - 1][task])
    results = (forgetting.result(), transfer.result())
    first_minus_last, forward_transfer = (float(np.mean(list(values.values()))) for values in results)
    return {"first_minus_last": first_minus_last, "forward_transfer": forward_transfer}


PEERS: dict[str, Callable[[Square, list[float]], Numbers]] = {"continuum": continuum, "avalanche": avalanche}


def draw(tasks: int, generator: np.random.Generator) -> tuple[Square, list[float]]:
    """A full matrix of accuracies, what is above the diagonal included, and a baseline."""
    counts = generator.integers(0, SAMPLES + 1, (tasks + 1, tasks)) / SAMPLES
    return counts[1:].tolist(), counts[0].tolist()


def _file(package: str, path: str, stubs: Callable[[], dict[str, ModuleType]] = dict) -> ModuleType:
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.submodule_search_locations
    spec = importlib.util.spec_from_file_location(f"peer_{package}", Path(found.submodule_search_locations[0]) / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = {name: sys.modules.get(name) for name in stubs()}
    sys.modules.update(stubs())
    try:
        spec.loader.exec_module(module)
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    return module


def _avalanche_stubs() -> dict[str, ModuleType]:
    """What the two files import from the rest of Avalanche, for their plugins, which are not called."""
    any_type = TypeVar("any_type")

    class Base(Generic[any_type]):
        pass

    names = {
        "metric_definitions": ("Metric", "PluginMetric"),
        "metric_results": ("MetricValue", "MetricResult"),
        "metrics": ("TaskAwareAccuracy", "Mean"),
        "metric_utils": ("get_metric_name", "phase_and_task", "stream_type"),
    }
    modules = {"avalanche": ModuleType("avalanche"), "avalanche.evaluation": ModuleType("avalanche.evaluation")}
    for name, members in names.items():
        module = ModuleType(f"avalanche.evaluation.{name}")
        for member in members:
            setattr(module, member, Base)
        modules[module.__name__] = module
    return modules


def main() -> None:
    generator = np.random.default_rng(0)
    cases = []
    for tasks in (2, 2, 3, 3, 4, 4, 5, 6, 8, 10):
        a, baseline = draw(tasks, generator)
        cases.append(
            {"accuracies": a, "baseline": baseline} | {name: peer(a, baseline) for name, peer in PEERS.items()}
        )
    made = {
        "made_by": "tests/metrics/peers.py",
        "versions": {name: version(name) for name in ("avalanche-lib", "continuum", "numpy")},
    }
    NUMBERS.write_text(json.dumps(made | {"cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
