"""Bar 2: 20 forecasts along a training cost within 3x of one Gram product of the new features and one eigh."""

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median
from time import sleep
from typing import Any

import numpy as np
import torch
from torch import Tensor

import forgetcast as fc
from benchmarks.machine import floor, interleaved, save, seconds, spread
from forgetcast.forecast.closed_form import read
from forgetcast.tangent.moments import gram

N_OLD, N_NEW, WIDTH, OUTPUTS = 50_000, 20_000, 768, 100
STEPS = [1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 400, 500, 700, 850, 1000]
TRAINING = fc.GradientDescent(learning_rate=20.0, steps=1000)


def task(rows: int, low: int, high: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(low, high, (rows,), generator=draw)
    return 0.3 * centres[labels] + torch.randn(rows, WIDTH, generator=draw), labels


def start() -> fc.LinearHead:
    weight = torch.randn(WIDTH, OUTPUTS, generator=torch.Generator().manual_seed(3)) / WIDTH**0.5
    return fc.LinearHead(weight, torch.zeros(OUTPUTS))


def exact_drift(old: Tensor, new: Tensor, labels: Tensor, head: fc.LinearHead) -> Tensor:
    """The same forecast by the textbook formula, all in float64."""
    phi, probe = (torch.cat([part.double(), torch.ones(len(part), 1).double()], 1) for part in (new, old))
    scale = 2 / (len(phi) * OUTPUTS)
    residual = phi @ head.stacked() - torch.nn.functional.one_hot(labels, OUTPUTS).double()
    values, vectors = torch.linalg.eigh(scale * phi.T @ phi)
    gain = (1 - (1 - TRAINING.learning_rate * values) ** TRAINING.steps) / values
    return -probe @ (vectors @ (gain[:, None] * (vectors.T @ (scale * phi.T @ residual))))


def run() -> dict[str, Any]:
    machine = floor()
    (old, old_labels), (new, labels), head = task(N_OLD, 0, 50, 1), task(N_NEW, 50, OUTPUTS, 2), start()

    def forecast() -> fc.LinearForecast:
        return fc.forecast_linear(fc.Features(old, old_labels), fc.Features(new, labels), head, TRAINING)

    kept = fc.Moments.of(fc.Features(old, old_labels), OUTPUTS)
    contestants = {
        "floor": lambda: torch.linalg.eigh((new.T @ new).double()),
        "floor and old Gram": lambda: (torch.linalg.eigh((new.T @ new).double()), old.T @ old),
        "moments": lambda: fc.forecast_moments(kept, fc.Features(new, labels), head, TRAINING).at(steps=STEPS),
        "weights": lambda: forecast().at(steps=STEPS),
        "mean squared drift": lambda: forecast().at(steps=STEPS).mean_squared_drift,
        "accuracy": lambda: forecast().at(steps=STEPS).accuracy,
    }
    times = interleaved(contestants, 7)
    ratios = {
        base: {
            name: {
                "median": median(value / least for value, least in zip(times[name], times[base], strict=True)),
                "of_minima": min(times[name]) / min(times[base]),
            }
            for name in ("moments", "weights", "mean squared drift", "accuracy")
        }
        for base in ("floor", "floor and old Gram")
    }
    done = forecast()
    truth = exact_drift(old, new, labels, head)
    return {
        "setting": {"n_old": N_OLD, "n_new": N_NEW, "d": WIDTH, "C": OUTPUTS, "steps": STEPS},
        "machine": machine,
        "seconds": {name: spread(values) for name, values in times.items()},
        "ratio_to": ratios,
        "bar": 3.0,
        "drift_relative_error_against_float64": float((done.drift - truth).norm() / truth.norm()),
        "parts_seconds": parts(old, old_labels, new, labels, head),
        "memory": [streamed(rows) for rows in (8192, 16384)],
    }


def parts(old: Tensor, old_labels: Tensor, new: Tensor, labels: Tensor, head: fc.LinearHead) -> dict[str, float]:
    """Least time of every part, three times each."""
    features = fc.Features(old, old_labels), fc.Features(new, labels)
    done = fc.forecast_linear(*features, head, TRAINING)
    path = done.at(steps=STEPS)
    works = {
        "check arrays": lambda: (fc.Features(old, old_labels), fc.Features(new, labels)),
        "read new (Gram, slope, eigh)": lambda: read(features[1], head),
        "forecast": lambda: fc.forecast_linear(*features, head, TRAINING),
        "weights at 20 steps": lambda: done.at(steps=STEPS),
        "old Gram": lambda: [gram(block) for block in old.split(8192)],
        "accuracy at 20 steps": lambda: done.accuracies(path.changes),
    }
    return {name: min(seconds(work) for _ in range(3)) for name, work in works.items()}


def streamed(block_rows: int) -> dict[str, Any]:
    """Peak memory of forecast, 20 values of steps and their drift, in a process of its own, features on disk."""
    command = [sys.executable, "-m", "benchmarks.linear_many_steps", str(block_rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout)


def anonymous_bytes() -> int:
    """RssAnon: memory of this process without mapped files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def memory(block_rows: int) -> dict[str, Any]:
    """RssAnon, sampled every millisecond, above its value after a small forecast has loaded every library."""
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for name, arguments in {"old": (N_OLD, 0, 50, 1), "new": (N_NEW, 50, OUTPUTS, 2)}.items():
            subprocess.run([sys.executable, "-m", "benchmarks.linear_many_steps", folder, name, *map(str, arguments)])
            shape = (arguments[0], WIDTH)
            phi = np.memmap(Path(folder) / f"{name}.phi", np.float32, mode="r", shape=shape)
            parts.append((phi, np.load(Path(folder) / f"{name}.npy")))
        head = start()
        small = [fc.Features(phi[:1000], y[:1000]) for phi, y in parts]
        _ = fc.forecast_linear(*small, head, TRAINING).at(steps=STEPS).mean_squared_drift
        baseline, peak, going = anonymous_bytes(), [0], [True]

        def watch() -> None:
            while going[0]:
                peak[0] = max(peak[0], anonymous_bytes())
                sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        features = [fc.Features(phi, y, block_rows) for phi, y in parts]
        _ = fc.forecast_linear(*features, head, TRAINING).at(steps=STEPS).mean_squared_drift
        going[0] = False
        watcher.join()
    block = 4 * block_rows * WIDTH
    result = 2 * 4 * N_OLD * OUTPUTS + 8 * len(STEPS) * (WIDTH + 1) * OUTPUTS
    above = peak[0] - baseline
    return {
        "block_rows": block_rows,
        "peak_above_baseline_mb": above / 1e6,
        "feature_block_mb": block / 1e6,
        "returned_mb": result / 1e6,
        "peak_over_block": above / block,
        "peak_without_returned_over_block": (above - result) / block,
        "method": "RssAnon of /proc/self/status, sampled every ms; baseline after a forecast of 1,000 samples",
    }


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(memory(int(sys.argv[1]))))
    elif len(sys.argv) > 2:  # a child that writes the features, so that drawing them leaves no memory behind
        folder, name, *numbers = sys.argv[1:]
        phi, y = task(*map(int, numbers))
        phi.numpy().tofile(Path(folder) / f"{name}.phi")
        np.save(Path(folder) / f"{name}.npy", y.numpy())
    else:
        save("linear_many_steps", run())
