"""The results table as a page; every figure in it comes from the JSON."""

from base64 import b64decode
from collections.abc import Callable, Sequence
from math import hypot, sqrt
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.stats import norm, t

COLUMNS = ("average_accuracy", "last_accuracy", "learning_accuracy", "first_minus_last", "best_minus_last")
CEILING = "joint, ceiling"

HEAD = """# Results

Written by `python -m benchmarks.method_table DATA`, the reading included; the numbers, with every accuracy matrix, are
in `benchmarks/results/method_table.json`.

Class-incremental, {seeds} seeds, each with its own class order, network and sample order, the same for every row; test
samples are fixed. Accuracies in points, mean ± standard deviation over seeds; columns are defined in
`forgetcast.metrics`. `told` is the accuracy after the last task where each prediction may choose among the classes of
its own task alone. `minus ceiling` is the last accuracy minus that of `joint, ceiling`, with a 95% interval of both
noises: that between seeds (paired, Student's t) and that of the test samples (paired, normal), which add in squares.
**Bold** where it leaves out zero.

Every gradient method has the same steps and batches, and every row a learning rate chosen by one rule: of {rates} the
one with the highest last accuracy on validation samples of seed {tuning_seed}, which is no seed of the table. SLCA's
head takes that rate and its backbone a hundredth of it, the ratio of its defaults. All else is at the library's
defaults; buffers hold 500 samples and the Fisher is exact. Placed rows: the head's rows of new classes are fitted on
frozen features before the rest trains. `trains` counts numbers that gradient steps move in the last task (in the first,
for a first session), `keeps` all numbers kept, weights included; `s` are seconds of one core, evaluation included. All
that this page needs took {minutes:.0f} minutes of one core.

- `joint, ceiling` is the upper bound: at every stage a new network is trained on all samples so far, to convergence
  (cosine schedule), with a hidden layer of {wide:,} units more, so that it could be any of the closed forms on random
  features. Rate and dropout are chosen on the same validation samples.
- `joint` is the fair control: network, steps and batches of the gradient methods, on all samples so far.
- Closed forms read features of the network as it is drawn (digits) or pretrained (CIFAR-100); `probe` and `spectral`
  train a head on these.

Of CIFAR-100 these are the first images of each class, and they stand in an order of likeness: class means of the
features have 51.7 points on the first ones and 54.1 ± 0.2 on as many drawn at random."""

Table = dict[str, Any]


def page(result: Table, reading: Callable[[Table], list[str]]) -> str:
    """The page.

    Args:
        result: the JSON.
        reading: sentences about a table.
    """
    tables = list(result["tables"].values())
    tried = [run["identity"]["choice"]["learning_rate"] for run in tables[0]["tuning"]["sequential"].values()]
    places = [place for table in tables for name in ("rows", "tuning") for place in table[name].values()]
    runs = [run for place in (*places, *(table["checks"] for table in tables)) for run in place.values()]
    head = HEAD.format(
        seeds=len(result["seeds"]),
        rates=", ".join(f"{rate:g}" for rate in tried),
        tuning_seed=result["tuning_seed"],
        wide=result["wide"],
        minutes=sum(run["cpu_seconds"] for run in runs) / 60,
    )
    parts = [
        f"## {table['title']}\n\n{_caption(table)}\n\n{rows(table)}\n\n{_items(reading(table))}" for table in tables
    ]
    return "\n\n".join([head, *parts]) + "\n"


def rows(table: Table) -> str:
    """The table, the best last accuracy first."""
    heads = ["method", *(f"`{column}`" for column in COLUMNS), "told", "minus ceiling", "rate", "trains", "keeps", "s"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for label in sorted(table["rows"], key=lambda label: -fmean(values(table, label))):
        runs = list(table["rows"][label].values())
        rate = runs[0]["identity"]["choice"].get("learning_rate")
        cells = [
            label,
            *(spread(values(table, label, column)) for column in COLUMNS),
            "" if label == CEILING else spread(told(table, label)),
            "" if label == CEILING else _gap(table, label),
            "" if rate is None else f"{rate:g}",
            f"{runs[0]['trainable_parameters']:,}",
            f"{runs[0]['stored_numbers']:,}",
            f"{fmean(run['seconds'] for run in runs):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def values(table: Table, label: str, metric: str = "last_accuracy") -> list[float]:
    """A metric of a row, in points, seed by seed."""
    return [100 * run["metrics"][metric] for _, run in sorted(table["rows"][label].items())]


def told(table: Table, label: str) -> list[float]:
    """The last accuracy of a row with the task told, in points, seed by seed."""
    return [100 * run["task_incremental_last_accuracy"] for _, run in sorted(table["rows"][label].items())]


def minus(table: Table, label: str, other: str) -> tuple[float, float]:
    r"""The last accuracy of a row minus that of another: mean, and half the width of its 95% interval.

        half^2 = (t_{n-1} s_seeds / sqrt(n))^2 + (z s_samples / sqrt(N))^2

    over n paired seeds, and N test samples of which each has the mean over seeds of "right" minus "right".
    """
    ours, theirs = values(table, label), values(table, other)
    gaps = [mine - yours for mine, yours in zip(ours, theirs, strict=True)]
    count, samples = len(gaps), table["test_samples"]
    by_sample = 100 * (_right(table, label) - _right(table, other)).mean(0)
    seeds = t.ppf(0.975, count - 1) * stdev(gaps) / sqrt(count)
    return fmean(gaps), hypot(seeds, norm.ppf(0.975) * by_sample.std(ddof=1) / sqrt(samples))


def spread(numbers: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{fmean(numbers):.1f} ± {stdev(numbers):.1f}"


def _right(table: Table, label: str) -> np.ndarray:
    runs = [run for _, run in sorted(table["rows"][label].items())]
    bits = [np.unpackbits(np.frombuffer(b64decode(run["right"]), dtype=np.uint8)) for run in runs]
    return np.stack(bits)[:, : table["test_samples"]].astype(float)


def _gap(table: Table, label: str) -> str:
    mean, half = minus(table, label, CEILING)
    mark = "**" if abs(mean) > half else ""
    return f"{mark}{mean:+.1f} ± {half:.1f}{mark}"


def _items(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _caption(table: Table) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in table["optimization"].items() if key != "learning_rate")
    return f"Gradient methods: {settings}."
