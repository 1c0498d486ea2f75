from copy import deepcopy
from typing import Any

import numpy as np
import pytest

PER_TASK = 2
SAMPLES = 36


def make_record(tasks: int = 5, classes: int = 10, drift_points: int = 240) -> dict[str, Any]:
    """A record as a run writes it, with seeded numbers: forecasts near the measurements, but not equal to them."""
    rng = np.random.default_rng(0)
    order = [int(name) for name in rng.permutation(classes)]
    per_task = classes // tasks
    forecast_matrix: list[list[float | None]] = [[None] * tasks for _ in range(tasks)]
    measured_matrix = deepcopy(forecast_matrix)
    before = dict.fromkeys(order[:per_task], 0.985)
    forecast_matrix[0][0] = measured_matrix[0][0] = 0.985
    entries = []
    for task in range(2, tasks + 1):
        old, new = order[: (task - 1) * per_task], order[(task - 1) * per_task : task * per_task]
        kept = {name: float(before[name] * rng.uniform(0.3, 1.0)) for name in old}
        forecast = {name: float(np.clip(kept[name] + rng.normal(0, 0.02), 0, 1)) for name in old}
        entries.append(_entry(rng, task, new, old, before, forecast, kept, drift_points))
        for done in range(task - 1):
            group = order[done * per_task : (done + 1) * per_task]
            measured_matrix[task - 1][done] = float(np.mean([kept[name] for name in group]))
            forecast_matrix[task - 1][done] = float(np.mean([forecast[name] for name in group]))
        measured_matrix[task - 1][task - 1] = 0.975
        before = {**kept, **dict.fromkeys(new, 0.975)}
    return {
        "schema": "forgetcast.record/1",
        "name": "digits",
        "created": "2026-11-21T10:00:00+00:00",
        "source": {"name": "digits", "samples": 1797, "hash": "ab12"},
        "recipe": {
            "training": {"kind": "GradientDescent", "learning_rate": 0.5, "steps": 300, "loss": "cross_entropy"},
            "bias": True,
            "increment": per_task,
        },
        "seed": 0,
        "class_order": order,
        "split_hash": "sha256:3f1c",
        "weights_hash": "sha256:90aa",
        "versions": {"forgetcast": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "seconds": 12.3,
        "definitions": {
            "average_accuracy": "mean over stages t of the accuracy on all classes seen so far",
            "first_minus_last": "1/(T-1) sum_{j<T} (a_jj - a_Tj)",
        },
        "tasks": entries,
        "accuracy_matrix": {"measured": measured_matrix, "forecast": forecast_matrix},
        "metrics": {"average_accuracy": 0.8312345678, "first_minus_last": 0.31415926535},
    }


def _entry(rng, task, new, old, before, forecast, kept, drift_points) -> dict[str, Any]:
    measured_drift = rng.normal(0, 1.5, drift_points)
    predicted_drift = measured_drift + rng.normal(0, 0.12, drift_points)
    eigenvalue = 900 * np.exp(-0.17 * np.arange(64))
    energy = eigenvalue * rng.uniform(0.02, 0.2, 64)
    cumulative = np.cumsum(energy) / energy.sum()
    rank = int(np.argmax(cumulative >= 0.9)) + 1
    means = [float(np.mean([shares[name] for name in old])) for shares in (before, forecast, kept)]
    return {
        "task": task,
        "classes": new,
        "new_samples": 290,
        "old_samples": SAMPLES * len(old),
        "forecast": {"accuracy_before": means[0], "accuracy": means[1], "relative_drift": 0.5, "seconds": 0.01},
        "measured": {"accuracy": means[2], "relative_drift": 0.5, "seconds": 0.4},
        "calibration": {
            "relative_error": 0.0812345,
            "cosine": 0.99671234,
            "one_minus_cosine": 0.00328766,
            "accuracy_error": abs(means[1] - means[2]),
            "rank_correlation": None if task == 2 else 0.93456,
        },
        "drift_points": np.stack([predicted_drift, measured_drift], axis=1).tolist(),
        "per_class": [
            {
                "class": name,
                "samples": SAMPLES,
                "accuracy_before": before[name],
                "accuracy_forecast": forecast[name],
                "accuracy_measured": kept[name],
            }
            for name in old
        ],
        "modes": {"eigenvalue": eigenvalue.tolist(), "energy": energy.tolist(), "cumulative": cumulative.tolist()},
        "vulnerable_rank": {
            "energy": 0.9,
            "order": "eigenvalue",
            "sample_modes": rank,
            "outputs": PER_TASK * task,
            "function_modes": rank * PER_TASK * task,
        },
        "effective_rank": 11.7,
    }


@pytest.fixture(scope="session")
def run_record() -> dict[str, Any]:
    """Shared, not to be changed."""
    return make_record()


@pytest.fixture
def record(run_record) -> dict[str, Any]:
    """A copy that a test may change."""
    return deepcopy(run_record)
