"""The table of gradient projection as a page; every figure in it, those of its sentences too, comes from the JSON."""

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t

from benchmarks.projection_memory import memory_rows
from benchmarks.projection_runs import Learner, Table, row_of

HEAD = """# Gradient projection on real models

Written by `python -m benchmarks.projection_table DATA`, the sentences included; the numbers, with every accuracy
matrix, are in `benchmarks/results/projection.json`. What is projected, and why: docs/projection.md.

Class-incremental, all seen classes to choose from, {seeds} seeds ({listed}): each its own task order, tuner and order
of samples, the same with and without projection. Two classifiers on the same features: **class means** (cosine), each
class's mean taken when its task was learnt and kept, and the **linear head** that the tuner is trained with. Trials
on one seed with the linear head alone had shown that its forgetting is mostly competition between rows of classes,
which the frozen model has too; projection protects features, and class means see nothing else: so they were made the
first of the two, before any run of this table. The softmax of the loss runs over the task's own classes; rows of old
classes get no gradient and stand still.

Accuracies in points, mean ± standard deviation over seeds. `last`, `average`, `learning` and `forgetting` are
`last_accuracy`, `average_accuracy`, `learning_accuracy` (each task just after it was learnt) and `first_minus_last`
of `forgetcast.metrics`; `told` are last accuracy and forgetting of the linear head with the task told. Forgetting
among all seen classes is not drift alone: it counts also what a frozen model loses because later classes join in (see
controls). `drift` is, for the first task's test samples, |features at the end - features after that task| / |the
latter|. `free` are directions left at the end, in the fullest space and on average over spaces; gates, which stand
still after the first task, are left out. `s` are seconds of training on one core, the reading of each task for its
spaces included.

Both sides of a pair have the same tuner, rates, steps and batches (AdamW without weight decay, a new one each task).
Rates are chosen without projection on validation samples (a fifth of the training samples) of the first {tuning_tasks}
tasks of seed {tuning_seed}, which is no seed of the table: of the linear head by its last accuracy on frozen features,
then of each tuner by how well it learns, its accuracy on each newest task, that task told. Tried: {rates}. Projection
has its defaults (threshold 0.95 of sigma^2, corrected conditions, steps); nothing of it was tuned.

Of CIFAR-100 these are the first images of each class, and they stand in an order of likeness: class means of frozen
features (at 224 px, 30 training and 10 test images a class) have 56.2 points on the first ones and 51.8 ± 1.8 on images
drawn at random. Rows are compared on the same images; their levels are those of these images.

Tuners: {tuners}."""

LAST, FORGETTING = "last_accuracy", "first_minus_last"
NAMES = {"adapter": "adapter", "lora": "LoRA", "prefix": "prefix", "prompt": "deep prompt"}
CONTROLS: tuple[tuple[str, str | None, Learner], ...] = (
    ("frozen, class means", None, "means"),
    ("frozen, linear head", None, "head"),
    ("adapter trained on the first task alone", "adapter", "first task"),
)
BUSIER = "Measured later, beside other work on the machine: seconds here say nothing."
WEIGHED = """Seed 0, one epoch a task, each run in a process of its own: how far the peak of its resident set rises
above that at the start of the first task; and what projection keeps of ten tasks, in float32."""
Metric = tuple[str, str]
CLASSIFIERS = {"means": "class means", "metrics": "linear head"}
SHOWN: tuple[Metric, ...] = (
    *((part, name) for part in CLASSIFIERS for name in (LAST, "average_accuracy", "learning_accuracy", FORGETTING)),
    ("told", LAST),
    ("told", FORGETTING),
)
ACCURACIES = " | ".join(
    [
        *(f"{part}: last | average | learning | forgetting" for part in CLASSIFIERS.values()),
        "told: last | forgetting | drift",
    ]
)
FREE = "free: least | mean"


def page(result: Table, reading: Callable[[Table], list[str]]) -> str:
    """The page.

    Args:
        result: the JSON.
        reading: sentences about it.
    """
    seeds = result["seeds"]
    head = HEAD.format(
        seeds=len(seeds),
        listed=", ".join(map(str, seeds)),
        tuning_tasks=result["tuning_tasks"],
        tuning_seed=result["tuning_seed"],
        rates=_rates(result),
        tuners=", ".join(f"`{options}`" for options in result["tuners"].values()),
    )
    parts = [head]
    for name, setting in result["settings"].items():
        known = setting["optimization"]
        parts += [
            f"## {setting['title']}",
            f"{known['epochs']} epochs a task, batches of {known['batch_size']}, rate of the head "
            f"{_head_rate(result, name)}. {_clip(result, name)}".strip(),
            _pairs(result, name),
            "Projected minus plain, paired by seed; **bold** where a 95% interval (Student's t) leaves out zero.",
            _differences(result, name),
            "Controls:",
            _controls(result, name),
        ]
    parts += ["## What it shows", _items(reading(result)), "## Other projections", BUSIER, _ablations(result)]
    weighed = memory_rows(result, NAMES)
    parts += (
        ["## Memory", WEIGHED, _table("setting | tuner | MiB, plain | projected | kept, MiB", weighed)]
        if weighed
        else []
    )
    spent = sum(run["cpu_seconds"] for part in ("tuning", "runs") for run in result[part].values()) / 60
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    counts = f"{len(result['runs'])} runs and {len(result['tuning'])} for rates"
    parts.append(f"{counts}, {spent:.0f} minutes of one core; {versions}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def values(result: Table, row: str, metric: Metric) -> list[float]:
    """A metric of a row in points, seed by seed; nothing where a seed is missing."""
    found = [result["runs"].get(f"{row} / seed {seed}") for seed in result["seeds"]]
    return [] if None in found else [100 * run[metric[0]][metric[1]] for run in found if run is not None]


def gains(result: Table, setting: str, tuner: str, metric: Metric) -> list[float]:
    """A metric with projection minus without, seed by seed; nothing where a seed is missing."""
    plain, projected = (values(result, row_of(setting, tuner, projection=options), metric) for options in (None, {}))
    return [after - before for before, after in zip(plain, projected, strict=True)] if plain and projected else []


def sure(gaps: Sequence[float]) -> bool:
    """Whether a 95% interval of the mean (Student's t) leaves out zero."""
    half = float(t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / sqrt(len(gaps))
    return abs(fmean(gaps)) > half


def _pairs(result: Table, setting: str) -> str:
    heads = f"tuner | projection | rate | {ACCURACIES} | {FREE} | s"
    lines = []
    for tuner, name in NAMES.items():
        for options in (None, {}):
            cells = _cells(result, row_of(setting, tuner, projection=options))
            if cells:
                lines.append([name, "no" if options is None else "yes", *cells])
    return _table(heads, lines)


def _controls(result: Table, setting: str) -> str:
    heads = f"control | rate | {ACCURACIES} | s"
    lines = []
    for label, tuner, learner in CONTROLS:
        cells = _cells(result, row_of(setting, tuner, learner))
        if cells:
            of_means = [cells[0] if learner != "means" else "", *cells[1:5]]
            of_head = cells[5:11] if learner != "means" else [""] * 6
            lines.append([label, *of_means, *of_head, cells[11], cells[-1]])
    return _table(heads, lines)


def _differences(result: Table, setting: str) -> str:
    metrics: dict[str, Metric] = {
        f"{label}: {short}": (part, name)
        for part, label in (CLASSIFIERS | {"told": "told"}).items()
        for short, name in (("forgetting", FORGETTING), ("last", LAST))
    }
    lines = []
    for tuner, name in NAMES.items():
        gaps = [gains(result, setting, tuner, metric) for metric in metrics.values()]
        if all(gaps):
            lines.append([name, *(_gap(gap) for gap in gaps)])
    return _table(f"tuner | {' | '.join(metrics)}", lines)


def _ablations(result: Table) -> str:
    setting = result["ablated"]
    rows: dict[str, Mapping[str, Any] | None] = {
        "none": None,
        **{f"threshold {value}": {"threshold": value} if value != 0.95 else {} for value in (0.8, 0.95, 0.99)},
        "gradients in the place of steps": {"target": "gradient"},
        "conditions of the paper": {"conditions": "paper"},
    }
    lines = []
    for tuner, name in NAMES.items():
        for label, options in rows.items():
            cells = _cells(result, row_of(setting, tuner, projection=options))
            if cells:
                lines.append([name, label, *cells[1:]])
    heads = f"tuner | projection | {ACCURACIES} | {FREE} | s"
    return f"{result['settings'][setting]['title']}.\n\n{_table(heads, lines)}" if lines else ""


def _cells(result: Table, row: str) -> list[str]:
    """Rate, accuracies, drift, free directions, seconds; nothing where a seed is missing."""
    runs = [result["runs"].get(f"{row} / seed {seed}") for seed in result["seeds"]]
    if None in runs:
        return []
    known: list[Table] = [run for run in runs if run is not None]
    free = [_free(run) for run in known if "free" in run]
    return [
        f"{known[0]['identity']['rate' if known[0]['identity']['tuner'] else 'head_rate']:g}",
        *(_spread(values(result, row, metric)) for metric in SHOWN),
        f"{fmean(run['drift'][-1] for run in known):.2f}",
        *([f"{100 * fmean(part):.0f}%" for part in zip(*free, strict=True)] if free else ["", ""]),
        f"{fmean(run['seconds'] for run in known):.0f}",
    ]


def _free(run: Table) -> tuple[float, float]:
    shares = [free / width for free, width in zip(run["free"], run["width"], strict=True) if width > 1]
    return min(shares), fmean(shares)


def _head_rate(result: Table, setting: str) -> str:
    return (
        f"{next(run['identity']['head_rate'] for run in result['runs'].values() if run['row'].startswith(setting)):g}"
    )


def _clip(result: Table, setting: str) -> str:
    if setting != "vit" or "clip" not in result:
        return ""
    kept, without = (100 * result["clip"][name] for name in ("as trained", "without"))
    return (
        "Attention is PyTorch's own function, which prefixes and prompts need: of the clips that this ViT was trained "
        f"with, the one on the probabilities is left out of the tuned blocks. Class means have {kept:.1f} points with "
        f"it and {without:.1f} without."
    )


def _rates(result: Table) -> str:
    """What was tried, those that were tried alike together."""
    tried: dict[str, list[float]] = {}
    for run in result["tuning"].values():
        options = run["identity"]["tuner"]
        name = options.split("(")[0] if options else "head"
        tried.setdefault(name, []).append(run["identity"]["rate" if options else "head_rate"])
    alike: dict[str, list[str]] = {}
    for name, rates in tried.items():
        alike.setdefault(", ".join(f"{rate:g}" for rate in sorted(set(rates))), []).append(name)
    return "; ".join(f"{rates} ({', '.join(names)})" for rates, names in alike.items())


def _gap(gaps: Sequence[float]) -> str:
    mark = "**" if sure(gaps) else ""
    return f"{mark}{fmean(gaps):+.1f} ± {stdev(gaps):.1f}{mark}"


def _spread(numbers: Sequence[float]) -> str:
    return f"{fmean(numbers):.1f} ± {stdev(numbers):.1f}"


def _table(heads: str, lines: Sequence[Sequence[str]]) -> str:
    columns = heads.count("|") + 1
    return (
        "\n".join([f"| {heads} |", "|---" * columns + "|", *(f"| {' | '.join(line)} |" for line in lines)])
        if lines
        else ""
    )


def _items(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
