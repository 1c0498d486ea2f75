"""The demo: a class-incremental stream on a frozen network, each task forecast, trained for real, and compared.

The stream is run twice: plainly, and protected by the spectral regulariser (which stores no old sample).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from forgetcast.backbones.weights import weights_hash
from forgetcast.forecast.linear import LinearForecast, forecast_linear
from forgetcast.forecast.path import describe
from forgetcast.forecast.penalty import QuadraticPenalty
from forgetcast.forecast.result import COLUMNS, Calibration, Forecast, share_right
from forgetcast.forecast.training import GradientDescent
from forgetcast.learn.linear import train_linear_head
from forgetcast.metrics.matrix import DEFINITIONS, all_metrics
from forgetcast.protect.spectral import SpectralAnchor, combined_penalty
from forgetcast.report.page import write_report
from forgetcast.runs.record import provenance, write_record
from forgetcast.streams.scenarios import Stream, class_incremental
from forgetcast.streams.sources import Source
from forgetcast.tangent.features import Features
from forgetcast.tangent.linear_head import LinearHead

FEATURES = 256
MODES_SHOWN = 64
POINTS_SHOWN = 800
MODES_HELD = 24
TRAINING = GradientDescent(learning_rate=0.005, steps=100, momentum=0.9, loss="cross_entropy")
HOLD = 0.05


@dataclass(frozen=True, eq=False)
class Lane:
    """One way through the stream: the accuracies after each task, measured and forecast, and the tasks' entries."""

    measured: list[list[float]]
    forecast: list[list[float]]
    tasks: list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Prepared:
    """The stream's frozen features: `train` and `test` hold one `Features` a task."""

    stream: Stream
    train: list[Features]
    test: list[Features]
    network: nn.Module


def run_demo(source: Source, folder: Path, *, increment: int = 2, seed: int = 0, console: Console) -> Path:
    """Forecast, train and verify every task of the stream; write record and report; return the report's path.

    Raises:
        ValueError: a source that cannot be split into at least two tasks.
    """
    started = perf_counter()
    stream = class_incremental(source, increment, seed=seed)
    prepared = prepare(stream, seed)
    console.print(
        f"[bold]{source.name}[/]: {len(source.labels):,} samples, {len(stream)} tasks of {increment} classes, "
        f"class order {list(stream.class_order)}\n"
        f"a frozen random network of {FEATURES} features, one shared linear head, {TRAINING.steps} steps a task\n"
    )
    steps = 2 * len(stream) * TRAINING.steps
    with _progress(console, steps) as on_step:
        plain = run_lane(prepared, console, on_step, protected=False)
        console.print("\n[bold]The same stream, protected[/] by the spectral regulariser (no old sample is stored):\n")
        protected = run_lane(prepared, console, on_step, protected=True)
    record = _record(prepared, plain, protected, increment) | {"seconds": round(perf_counter() - started, 3)}
    write_record(record, folder)
    _print_summary(console, plain, protected)
    return write_report(record, folder)


def prepare(stream: Stream, seed: int) -> Prepared:
    """Send every sample through a small frozen network once: normalise, random linear map, ReLU, normalise."""
    inputs = torch.from_numpy(stream.source.inputs).flatten(1)
    generator = torch.Generator().manual_seed(seed)
    width = inputs.shape[1]
    linear = nn.Linear(width, FEATURES)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(FEATURES, width, generator=generator) * (2 / width) ** 0.5)
        linear.bias.zero_()
    normalised = nn.LayerNorm(width, elementwise_affine=False)
    network = nn.Sequential(normalised, linear, nn.ReLU(), nn.LayerNorm(FEATURES, elementwise_affine=False))
    with torch.no_grad():
        phi = torch.cat([network(part) for part in torch.split(inputs, 4096)])
    outputs = torch.from_numpy(stream.outputs)
    train, test = (
        [Features(phi[part], outputs[part], name=f"{which} features of task {index + 1}") for index, part in parts]
        for which, parts in (
            ("training", [(i, torch.from_numpy(task.train)) for i, task in enumerate(stream.tasks)]),
            ("test", [(i, torch.from_numpy(task.test)) for i, task in enumerate(stream.tasks)]),
        )
    )
    return Prepared(stream, train, test, network)


def run_lane(prepared: Prepared, console: Console, on_step: Callable[[], None], *, protected: bool) -> Lane:
    """Task after task: forecast, print, train for real, compare, print."""
    stream, lane = prepared.stream, Lane([], [], [])
    head = LinearHead.zeros(FEATURES, len(stream[0].classes))
    anchors: list[tuple[SpectralAnchor, int]] = []
    for index, (task, new) in enumerate(zip(stream.tasks, prepared.train, strict=True)):
        head = head.grow(max(task.classes) + 1)
        penalty = _penalty(anchors, head.outputs)
        tests = prepared.test[: index + 1]
        old = _joined(tests[:-1] or tests)
        started = perf_counter()
        forecast = forecast_linear(old, new, head, TRAINING, penalty)
        forecast_row = [_accuracy(forecast.head_after, test) for test in tests]
        seconds = perf_counter() - started
        before = [_accuracy(head, test) for test in tests[:-1]]
        if index:
            labels = ", ".join(str(stream.class_order[c]) for c in task.classes)
            console.print(f"[bold]Task {index + 1} of {len(stream)}[/], new classes {labels}")
            rank = forecast.vulnerable_rank()
            console.print(
                _line("forecast", forecast.accuracy_before, forecast.accuracy, before, forecast_row)
                + f"  [dim]{1000 * seconds:.0f} ms; {rank.energy:.0%} of the drift in {rank.sample_modes} modes "
                f"x {rank.outputs} outputs[/]"
            )
        started = perf_counter()
        head = train_linear_head(new.phi, new.y, head, TRAINING, penalty, on_step)
        trained = perf_counter() - started
        measured_row = [_accuracy(head, test) for test in tests]
        lane.forecast.append(forecast_row)
        lane.measured.append(measured_row)
        if index:
            logits = head.logits(old.phi)
            fit = forecast.compare(logits)
            assert fit.measured_accuracy is not None  # digits have labels
            console.print(
                _line("measured", forecast.accuracy_before, fit.measured_accuracy, before, measured_row)
                + f"  [dim]{1000 * trained:.0f} ms; 1 - cosine of the drift {fit.one_minus_cosine or 0:.1g}[/]\n"
            )
            lane.tasks.append(_entry(stream, index, forecast, logits, fit, (seconds, trained), len(new.phi)))
        if protected:
            anchors.append((SpectralAnchor.of(new, head, MODES_HELD), len(new.phi)))
    return lane


def _line(name: str, before: float, after: float, each_before: Sequence[float], each_after: Sequence[float]) -> str:
    tasks = ", ".join(f"task {i + 1}: {a:.0%} -> {b:.0%}" for i, (a, b) in enumerate(zip(each_before, each_after)))  # noqa: B905
    return f"  {name}  old accuracy {before:6.1%} -> {after:6.1%}   ({tasks})"


def _penalty(anchors: list[tuple[SpectralAnchor, int]], outputs: int) -> QuadraticPenalty | None:
    """`HOLD` times the mean squared drift along the held modes, summed over the old tasks."""
    grown = [(anchor.grow(outputs), rows) for anchor, rows in anchors]
    parts = [anchor.penalty(HOLD * anchor.modes * outputs / rows) for anchor, rows in grown]
    return combined_penalty(parts) if parts else None


def _joined(parts: Sequence[Features]) -> Features:
    return Features(torch.cat([p.phi for p in parts]), torch.cat([p.y for p in parts]), name="old test features")


def _accuracy(head: LinearHead, test: Features) -> float:
    return share_right(head.logits(test.phi), test.y)


def _entry(
    stream: Stream,
    index: int,
    forecast: LinearForecast,
    logits: Tensor,
    fit: Calibration,
    seconds: tuple[float, float],
    new_samples: int,
) -> dict[str, Any]:
    """What the record keeps of one task."""
    measured = Forecast(logits - forecast.logits_before, forecast.logits_before, forecast.targets)
    modes = forecast.modes(MODES_SHOWN)
    predicted, actual = forecast.drift.flatten(), measured.drift.flatten()
    shown = torch.randperm(len(predicted), generator=torch.Generator().manual_seed(stream.seed))[:POINTS_SHOWN]
    after = measured.per_class["accuracy"]
    return {
        "task": index + 1,
        "classes": [stream.class_order[c] for c in stream[index].classes],
        "new_samples": new_samples,
        "old_samples": len(logits),
        "forecast": {
            "accuracy_before": forecast.accuracy_before,
            "accuracy": forecast.accuracy,
            "relative_drift": forecast.relative_drift,
            "seconds": round(seconds[0], 4),
        },
        "measured": {
            "accuracy": fit.measured_accuracy,
            "relative_drift": measured.relative_drift,
            "seconds": round(seconds[1], 4),
        },
        "calibration": asdict(fit),
        "drift_points": torch.stack([predicted[shown], actual[shown]], 1).tolist(),
        "per_class": [
            {
                "class": stream.class_order[output],
                "samples": int(row["samples"]),
                "accuracy_before": float(row["accuracy_before"]),
                "accuracy_forecast": float(row["accuracy"]),
                "accuracy_measured": float(after.loc[output]),
            }
            for output, row in zip(
                forecast.per_class.index.tolist(), forecast.per_class.to_dict("records"), strict=True
            )
        ],
        "modes": {
            "eigenvalue": modes.eigenvalues.tolist(),
            "energy": modes.energy.tolist(),
            "cumulative": modes.cumulative.tolist(),
        },
        "vulnerable_rank": asdict(forecast.vulnerable_rank()),
        "effective_rank": modes.effective_rank,
    }


def _record(prepared: Prepared, plain: Lane, protected: Lane, increment: int) -> dict[str, Any]:
    stream = prepared.stream
    recipe = {
        "scenario": "class-incremental",
        "increment": increment,
        "features": f"frozen random ReLU network of width {FEATURES}",
        "training": describe(TRAINING),
        "spectral_regulariser": {"modes": MODES_HELD, "hold": HOLD},
    }
    return provenance() | {
        "name": stream.source.name,
        "source": {
            "name": stream.source.name,
            "samples": len(stream.source.labels),
            "hash": stream.source.hash,
        },
        "recipe": recipe,
        "seed": stream.seed,
        "class_order": list(stream.class_order),
        "split_hash": stream.split_hash,
        "weights_hash": weights_hash(prepared.network.state_dict()),
        "definitions": DEFINITIONS,
        "column_definitions": COLUMNS,
        "tasks": plain.tasks,
        "accuracy_matrix": {"measured": _square(plain.measured), "forecast": _square(plain.forecast)},
        "metrics": all_metrics(plain.measured),
        "protected": {
            "name": f"spectral regulariser, {MODES_HELD} modes a task",
            "tasks": protected.tasks,
            "accuracy_matrix": {"measured": _square(protected.measured), "forecast": _square(protected.forecast)},
            "metrics": all_metrics(protected.measured),
        },
    }


def _square(rows: Sequence[Sequence[float]]) -> list[list[float | None]]:
    return [[*row, *[None] * (len(rows) - len(row))] for row in rows]


def _print_summary(console: Console, plain: Lane, protected: Lane) -> None:
    table = Table(title="measured over the whole stream", title_justify="left")
    table.add_column("metric")
    table.add_column("plain", justify="right")
    table.add_column("protected", justify="right")
    table.add_column("definition", style="dim")
    ours, theirs = all_metrics(plain.measured), all_metrics(protected.measured)
    for name in ("average_accuracy", "last_accuracy", "learning_accuracy", "first_minus_last"):
        table.add_row(name, f"{ours[name]:.1%}", f"{theirs[name]:.1%}", DEFINITIONS[name])
    console.print(table)


@contextmanager
def _progress(console: Console, steps: int) -> Iterator[Callable[[], None]]:
    """A bar over all training steps; silent where the output is not a terminal."""
    columns = (TextColumn("training steps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("steps", total=steps)
        yield lambda: progress.advance(bar)
