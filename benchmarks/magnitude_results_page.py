"""The table of update magnitudes as a page; every figure in it, those of its sentences too, comes from the JSON."""

from collections.abc import Mapping
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

HEAD = """# How much of a network to train: measured

Written by `python -m benchmarks.magnitude_table DATA`, of the similarities `python -m benchmarks.magnitude_similarity
DATA`, the sentences included; the numbers, with every accuracy matrix and every decision, are in
`benchmarks/results/magnitude.json`. What the methods do: docs/magnitude.md.

The orderings that arXiv 2602.20796 reports, on streams of five tasks as near to its own as its text allows, {seeds}
seeds ({listed}) of classes, weights and order of samples, task-incremental (the task of a test sample is told). The
network is a convolution, eight residual blocks (16 to 128 channels, the first convolution at stride 2), the mean over
places and a linear head, from random weights. Small: {samples} training images a task, {epochs} epochs of SGD (rate
{learning_rate:g}, momentum {momentum:g}, weight decay {weight_decay:g}, batches of {batch_size}, cosine schedule). No
hyperparameter of these was tuned for one of the methods.

- **initialized**: all nine blocks train on every task.
- **frozen**: after the first task the last block and the head train.
- **adaptive**: {adaptive}; which blocks and how many is decided before each task.
- **adaptive, joint rows**: the same options; the two gradients that it compares are taken with rows of the head fitted
  to both tasks together, and not to each by itself. For this it keeps samples of the last task, which never train.

Options of frozen and adaptive were chosen on one stream (split CIFAR-100) at a seed that is not in the table; that
adaptive trains the last blocks, and not those of the lowest cosines, after the rows of the latter at seed 0 of this
table had been seen (one block in the middle of others that rest cost 5 points on split CIFAR-100). Streams: *split*,
new classes each; *correlated*, each task has half of its classes in common with the one before, with other samples;
*corrupted*, after the first task a damage of its own each (noise, blur, low contrast, wrong pixels); *permuted*, the
same digits with pixels in an order of the task's own.

Accuracies in points, mean ± standard deviation over seeds: `average`, of all tasks at the end (`last_accuracy`);
`own`, of each just after it was learnt (`learning_accuracy`); `forgetting` (`first_minus_last`). `trained` is the mean
share of parameters that train after the first task, head included, relative to initialized training; `s` are seconds
of training of a task after the first on one core, decisions included, on a machine with other work: they say little."""

METRICS = {"average": "last_accuracy", "own": "learning_accuracy", "forgetting": "first_minus_last"}
EDGES = ("correlated", "cifar100", "corrupted")
ORDER = ("correlated", "cifar100", "corrupted", "permuted")
ROWS = {"own": "rows of the head fitted to each task", "joint": "rows fitted to both"}
Table = Mapping[str, Any]


def page(result: Table) -> str:
    """The whole page."""
    runs, methods = result["runs"], result["methods"]
    samples = [run["samples"][0] for run in runs.values()]
    head = HEAD.format(
        seeds=len(result["seeds"]),
        listed=", ".join(map(str, result["seeds"])),
        samples=f"{min(samples)} to {max(samples)}",
        adaptive=", ".join(f"{key} {value}" for key, value in methods["adaptive"].items()) or "its defaults",
        **{
            key: result["optimization"][key]
            for key in ("epochs", "learning_rate", "momentum", "weight_decay", "batch_size")
        },
    )
    lines = ["| stream | method | average | own | forgetting | trained | s |", "|---|---|---|---|---|---|---|"]
    shown = [name for name in result["settings"] if all(values(result, name, method, "average") for method in methods)]
    for name in shown:
        for method in methods:
            cells = [_spread(values(result, name, method, metric)) for metric in METRICS]
            seconds = fmean(fmean(run["task_seconds"][1:]) for run in _runs(result, name, method))
            cells += [f"{_trained(result, name, method):.2f}", f"{seconds:.1f}"]
            lines.append(f"| {result['settings'][name]} | {method} | {' | '.join(cells)} |")
    parts = [_adaptive(result, shown), _edges(result, shown), _similar(result)]
    sentences = "\n".join(f"- {sentence}" for part in parts for sentence in part)
    return f"{head}\n\n" + "\n".join(lines) + f"\n\n## What it shows\n\n{sentences}\n"


def values(result: Table, setting: str, method: str, metric: str) -> list[float]:
    """In points, one a seed."""
    return [100 * run["metrics"][METRICS[metric]] for run in _runs(result, setting, method)]


def similarities(result: Table, setting: str, rows: str) -> list[float]:
    """Mean cosine of each task's gradient and that of the task before, one a seed."""
    place, found = result.get("similarities", {}), []
    while (key := f"{setting} / {rows} / seed {len(found)}") in place:
        found.append(place[key])
    return found


def _runs(result: Table, setting: str, method: str) -> list[Table]:
    """Of the seeds at which all methods have run."""
    rows = [
        {name: result["runs"].get(f"{setting} / {name} / seed {seed}") for name in result["methods"]}
        for seed in result["seeds"]
    ]
    return [row[method] for row in rows if None not in row.values()]


def _trained(result: Table, setting: str, method: str) -> float:
    pairs = zip(*(_runs(result, setting, name) for name in (method, "initialized")), strict=True)
    return fmean(
        fmean(
            some / whole
            for some, whole in zip(a["trainable_parameters"][1:], b["trainable_parameters"][1:], strict=True)
        )
        for a, b in pairs
    )


def _gaps(result: Table, setting: str, first: str, second: str, metric: str) -> list[float]:
    pairs = zip(*(values(result, setting, method, metric) for method in (first, second)), strict=True)
    return [a - b for a, b in pairs]


def _adaptive(result: Table, shown: list[str]) -> list[str]:
    found = []
    adaptive = [(method, other) for method in _adaptives(result) for other in ("initialized", "frozen")]
    for method, other in (*adaptive, ("frozen", "initialized")):
        gaps = {name: _gaps(result, name, method, other, "average") for name in shown}
        holds = sum(fmean(gap) >= 0 for gap in gaps.values())
        told = ", ".join(f"{name} {_spread(gap, sign='+')}" for name, gap in gaps.items())
        found.append(
            f"{method.capitalize()} is at least as accurate on average as {other} in {holds} of {len(gaps)} streams: "
            f"{told}."
        )
    return found


def _edges(result: Table, shown: list[str]) -> list[str]:
    if not set(EDGES) <= set(shown):
        return []
    found = []
    for metric, sign, word in (("average", 1, "accuracy"), ("forgetting", -1, "forgetting")):
        edges = {name: [sign * gap for gap in _gaps(result, name, "frozen", "initialized", metric)] for name in EDGES}
        means = {name: fmean(edge) for name, edge in edges.items()}
        told = ", ".join(f"{name} {_spread(edge, sign='+')}" for name, edge in edges.items())
        claims = [
            ("larger on the correlated stream", means["correlated"] > means["cifar100"]),
            ("smaller under corruption", means["corrupted"] < means["cifar100"]),
        ]
        verdict = ", ".join(f"{claim}: {'holds' if holds else 'does not hold'}" for claim, holds in claims)
        found.append(f"Frozen's edge over initialized in {word}: {told}. {verdict[0].upper()}{verdict[1:]}.")
    return found


def _adaptives(result: Table) -> list[str]:
    return [name for name in result["methods"] if name.startswith("adaptive")]


def _similar(result: Table) -> list[str]:
    found = []
    for rows, told_as in ROWS.items():
        every = {name: similarities(result, name, rows) for name in ORDER}
        seeds = min(map(len, every.values()))
        if not seeds:
            continue
        means = {name: own[:seeds] for name, own in every.items()}
        told = ", ".join(f"{name} {fmean(own):.2f} ({min(own):.2f} to {max(own):.2f})" for name, own in means.items())
        holds = all(fmean(means[first]) > fmean(means[second]) for first, second in pairwise(ORDER))
        steps = ", ".join(
            f"{first} > {second} in {sum(a > b for a, b in zip(means[first], means[second], strict=True))}"
            for first, second in pairwise(ORDER)
        )
        found.append(
            f"Mean cosine of the gradients of two tasks in a row, {told_as}, over {seeds} seeds of classes and "
            f"weights: {told}. The order {' > '.join(ORDER)} {'holds' if holds else 'does not hold'} for the means; "
            f"seed by seed {steps} of {seeds}."
        )
    return found


def _spread(own: list[float], sign: str = "") -> str:
    return f"{fmean(own):{sign}.1f} ± {stdev(own):.1f}" if len(own) > 1 else f"{fmean(own):{sign}.1f}"
