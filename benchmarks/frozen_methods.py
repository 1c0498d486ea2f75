"""Closed forms over all features of CIFAR-100, 10 tasks, one core: `python -m benchmarks.frozen_methods DATA`.

DATA is the folder of the shared data sets (`cifar100_deit_tiny_int8.npz`: 50,000 + 10,000 samples, 192 features).
"""

import os
import sys
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.machine import floor, save
from forgetcast.learn.loop import learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.registry import create
from forgetcast.streams.scenarios import class_incremental
from forgetcast.streams.sources import Source
from forgetcast.streams.stream import Stream

METHODS = ("ncm", "simplecil", "slda", "analytic", "fecam", "ranpac")


def source(folder: Path) -> Source:
    """All features, as they are."""
    archive = np.load(folder / "cifar100_deit_tiny_int8.npz")
    inputs = np.concatenate([archive["f_train"], archive["f_test"]]).astype(np.float32)
    labels = np.concatenate([archive["y_train"], archive["y_test"]]).astype(np.int64)
    return Source("CIFAR-100 features", inputs, labels, np.arange(len(archive["y_train"]), len(inputs)))


def measured(name: str, stream: Stream) -> dict[str, float]:
    """One method with its defaults, evaluated on all tasks seen after each; `cpu_seconds` hold on a busy machine."""
    method = create(name, nn.Identity(), stream.source.inputs.shape[1])
    wall, cpu = perf_counter(), process_time()
    done = learn(method, stream, Optimization())
    return {
        "cpu_seconds": process_time() - cpu,
        "seconds": perf_counter() - wall,
        "seconds_training": sum(done.seconds),
        "seconds_evaluation": sum(done.seconds_evaluation),
        "last_accuracy": done.metrics["last_accuracy"],
        "average_accuracy": done.metrics["average_accuracy"],
    }


def run(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    stream = class_incremental(source(folder), 10)
    return {
        "setting": {"tasks": len(stream), "training": 50_000, "test": 10_000, "batch_size": Optimization().batch_size},
        "machine": floor(),
        "methods": {name: measured(name, stream) for name in METHODS},
        "load_after": os.getloadavg()[0],
    }


if __name__ == "__main__":
    save("frozen_methods", run(Path(sys.argv[1])))
