"""Every method on the same streams, seeds and orders: `python -m benchmarks.method_table` writes docs/results.md.

DATA is the folder of the shared data sets (`cifar100_deit_tiny_int8.npz`); without it the table holds the digits alone.
"""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.machine import floor, save
from forgetcast.backbones.weights import weights_hash
from forgetcast.learn.loop import Learnt, learn, stored_numbers
from forgetcast.learn.optimizer import Optimization
from forgetcast.learn.seeding import seed_everything
from forgetcast.methods.registry import METHODS, create
from forgetcast.protect.placement import Placement
from forgetcast.streams.scenarios import Stream, class_incremental
from forgetcast.streams.sources import Source, digits

SEEDS = (0, 1, 2)
PER_CLASS = 100
COLUMNS = ("average_accuracy", "last_accuracy", "learning_accuracy", "first_minus_last", "best_minus_last")
PLACED = ("sequential", "ewc", "lwf", "replay")
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"capacity": 500} for name in ("replay", "der", "der++", "icarl")},
    **{name: {"fisher": "sampled"} for name in ("ewc", "kronecker_ewc")},
}


def cifar_features(folder: Path) -> Source:
    archive = np.load(folder / "cifar100_deit_tiny_int8.npz")
    labels = archive["y_train"].astype(np.int64)
    kept = np.sort(np.concatenate([np.flatnonzero(labels == label)[:PER_CLASS] for label in np.unique(labels)]))
    inputs = np.concatenate([archive["f_train"][kept], archive["f_test"]]).astype(np.float32)
    answers = np.concatenate([labels[kept], archive["y_test"].astype(np.int64)])
    return Source("CIFAR-100 features", inputs, answers, np.arange(len(kept), len(inputs)))


def small_network(width: int) -> tuple[nn.Module, int]:
    return nn.Sequential(nn.Linear(width, 128), nn.ReLU()), 128


def frozen(width: int) -> tuple[nn.Module, int]:
    return nn.Identity(), width


SETTINGS = {
    "digits, 5 tasks of 2 classes, a network of one hidden layer (128) that trains": (
        digits, 2, small_network, Optimization(learning_rate=3e-3, epochs=10, batch_size=32),
    ),
    f"CIFAR-100 through a frozen DeiT-Tiny, 10 tasks of 10 classes, {PER_CLASS} training samples a class": (
        None, 10, frozen, Optimization(learning_rate=3e-3, epochs=5, batch_size=64),
    ),
}  # fmt: skip


def one(name: str, stream: Stream, make: Any, optimization: Optimization, seed: int, *, placed: bool) -> dict[str, Any]:
    seed_everything(seed)
    backbone, width = make(stream.source.inputs.shape[1])
    options = OPTIONS.get(name, {})
    method = create(name, backbone, width, **options)
    if placed:
        method.protections = (Placement(), *method.protections)
    started = perf_counter()
    done: Learnt = learn(method, stream, optimization, seed=seed)
    return {
        "seed": seed,
        "class_order": list(stream.class_order),
        "split_hash": stream.split_hash,
        "weights_hash": weights_hash(method.model.state_dict()),
        "metrics": done.metrics,
        "accuracy_matrix": done.accuracy_matrix,
        "stored_numbers": stored_numbers(method.state_dict()),
        "trainable_parameters": done.trainable_parameters[-1],
        "seconds": perf_counter() - started,
    }


def run(folder: Path | None = None) -> dict[str, Any]:
    result: dict[str, Any] = {"machine": floor(), "seeds": list(SEEDS), "tables": {}}
    for title, (source_of, increment, make, optimization) in SETTINGS.items():
        if source_of is None and folder is None:
            continue
        source = source_of() if source_of is not None else cifar_features(folder)
        streams = [class_incremental(source, increment, seed=seed) for seed in SEEDS]
        rows: dict[str, Any] = {}
        for name in METHODS:
            if name == "spectral" and make is not frozen:
                continue  # it holds a head on features that do not change; on a random network it would be another task
            for placed in (False, True) if name in PLACED else (False,):
                work = partial(one, name, make=make, optimization=optimization, placed=placed)
                label = f"{name}, placed rows" if placed else name
                rows[label] = [work(stream=stream, seed=seed) for stream, seed in zip(streams, SEEDS, strict=True)]
                last = [row["metrics"]["last_accuracy"] for row in rows[label]]
                print(
                    f"{title[:10]} {label:24} {mean(last):.3f} {sum(row['seconds'] for row in rows[label]):.1f} s",
                    flush=True,
                )
        result["tables"][title] = {"optimization": asdict(optimization), "source": source.hash, "rows": rows}
    return result


def cell(values: list[float]) -> str:
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"


def page(result: dict[str, Any]) -> str:
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmarks.method_table DATA` (numbers: `benchmarks/results/method_table.json`).",
        f"Class-incremental, {len(result['seeds'])} seeds, each with its own class order, network and sample order;",
        "points, mean ± standard deviation over seeds. Every method has the same steps, batches and learning rate,",
        "nothing was tuned for any, and buffers hold 500 samples. Placed rows: the head's rows of new classes are",
        "fitted on frozen features before the rest trains. `stored` counts all numbers kept, weights included.",
    ]
    for title, table in result["tables"].items():
        settings = ", ".join(f"{key} {value}" for key, value in table["optimization"].items())
        lines += ["", f"## {title}", "", f"Gradient methods: {settings}.", ""]
        lines += [
            "| method | "
            + " | ".join(f"`{column}`" for column in COLUMNS)
            + " | numbers that train | numbers kept | seconds |"
        ]
        lines += ["|---" * (len(COLUMNS) + 4) + "|"]
        ordered = sorted(
            table["rows"].items(), key=lambda item: -mean(row["metrics"]["last_accuracy"] for row in item[1])
        )
        for name, rows in ordered:
            cells = [cell([row["metrics"][column] for row in rows]) for column in COLUMNS]
            size, kept = f"{rows[0]['trainable_parameters']:,}", f"{rows[0]['stored_numbers']:,}"
            lines += [
                f"| {name} | " + " | ".join(cells) + f" | {size} | {kept} | {mean(r['seconds'] for r in rows):.1f} |"
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured = run(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    save("method_table", measured)
    (Path(__file__).parents[1] / "docs" / "results.md").write_text(page(measured))
