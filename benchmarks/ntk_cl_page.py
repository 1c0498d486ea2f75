"""The table of NTK-CL as a page; every figure and sentence in it comes from the JSON."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

Table = Mapping[str, Any]
AVERAGE, LAST = "average_accuracy", "last_accuracy"
MAIN, RELEASED = "corrected", ("released", "released, SGD")

HEAD = """# NTK-CL on real images

Written by `python -m benchmarks.ntk_cl_table DATA`, the sentences included; the numbers, with every accuracy
matrix, are in `benchmarks/results/ntk_cl.json`. What the parts are: docs/ntk_cl.md.

{title}.

Class-incremental, all seen classes to choose from, seeds {seeds}: each its own task order, parts and order of
samples, the same for all rows. `average` is `average_accuracy` (mean over stages of the accuracy on all classes
seen), `last` is `last_accuracy`, both in points, mean ± standard deviation over seeds. All rows have the same
frozen model below the tuned blocks, the same pixels (normalised as the weights ask, no augmentation), and 2 epochs
of batches of 16 with AdamW; `released, SGD` is trained as its authors do (momentum 0.9, decay 5e-4, cosine over
epochs). Rates are chosen by average accuracy on validation samples (a fifth of the training samples)
of all tasks of seed {tuning_seed}, which is no seed of the table. Weights of terms are the paper's (contrast 0.03) or
this project's defaults, and were not tuned. Scale of the proxies (20) and bandwidth (1) are those of the first trials,
at seed {tuning_seed}, trained on the same images and judged by training images outside of this table: bandwidths of 0.5
and 2 made no difference beyond noise, nor did a scale of 10 at a low rate. Where the head is linear, both it and class
means (cosine) of the features are shown.

`stored` are numbers in the state after the last task, the frozen blocks that are tuned included; `s` are processor
seconds of the whole run, evaluation included."""

TITLES = "| row | rate | average | last | last - frozen class means | stored | s |"
TELLING = 1.0
"""Points from frozen class means, by less of which a row has hardly trained."""
ABLATED = "| row | average | last | average, less than `corrected` by | last, less by |"


def page(result: Table) -> str:
    """The whole page."""
    head = HEAD.format(
        title=result["title"],
        seeds=", ".join(map(str, result["seeds"])),
        tuning_seed=result["tuning_seed"],
    )
    rows = by_label(result)
    main = [label for label in rows if not label.startswith(f"{MAIN},")]
    partial = [label for label, runs in rows.items() if label.startswith(f"{MAIN},") and len(runs) == len(rows[MAIN])]
    parts = [
        head,
        _TRIED,
        *tried(result),
        "## Beside other methods",
        "\n".join([TITLES, rule(TITLES), *_lines(rows, main)]),
        *_reading(rows, main),
    ]
    if partial and MAIN in rows:
        lines = [ABLATED, rule(ABLATED), *(_ablated(rows, label) for label in partial), *_votes(rows)]
        parts += ["## What each part gives", _ABOUT, "\n".join(lines), _compared(rows, partial)]
    if WITHOUT_ORTHOGONALITY in partial:
        parts += ["## Orthogonality and the kernel between tasks", *_interplay(rows)]
    return "\n\n".join(parts) + "\n"


_ABOUT = """Each row is `corrected` but for one thing: one part as the released code has it, one term without
weight, or one section without a
vote (the same trained model, asked again); at the rate of `corrected`. Differences are paired by seed,
mean ± standard deviation; **bold** where a 95% interval (Student's t) leaves out zero."""


_TRIED = """## Rates tried

Validation average / last in points, on 600 samples at the last stage: 2 points are one standard error of a last
accuracy, so that rates a point or two apart are told apart by chance. **Bold** is taken."""


def tried(result: Table) -> list[str]:
    """What each rate reached on validation samples."""
    tuned = list(result.get("tuning", {}).values())
    rates = sorted({one["rate"] for one in tuned})
    lines = [f"| row | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
    for label in dict.fromkeys(one["label"] for one in tuned):
        cells = []
        for rate in rates:
            found = [one["metrics"] for one in tuned if (one["label"], one["rate"]) == (label, rate)]
            cell = "".join(f"{100 * one[AVERAGE]:.1f} / {100 * one[LAST]:.1f}" for one in found)
            cells.append(f"**{cell}**" if rate == result["rates"].get(label) else cell)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return ["\n".join(lines)]


def rule(titles: str) -> str:
    """The line under the titles of a table."""
    return "|---" * (titles.count("|") - 1) + "|"


def by_label(result: Table) -> dict[str, dict[int, Table]]:
    """Runs of each row by seed; a row with class means beside its linear head is two."""
    found: dict[str, dict[int, Table]] = {}
    for one in result.get("runs", {}).values():
        shown = {"linear head": one["metrics"], "class means": one["means"]} if "means" in one else {"": one["metrics"]}
        for classifier, metrics in shown.items():
            label = ", ".join(filter(None, (one["label"], classifier)))
            found.setdefault(label, {})[one["seed"]] = {**one, "metrics": metrics}
    return found


def points(runs: Mapping[int, Table], name: str) -> list[float]:
    """A metric in points, seed by seed."""
    return [100 * runs[seed]["metrics"][name] for seed in sorted(runs)]


def told(values: Sequence[float], *, sign: bool = False) -> str:
    """Mean and spread; with a sign bold where it is sure."""
    if len(values) < 2:
        return f"{values[0]:+.1f}" if sign else f"{values[0]:.1f}"
    if not sign:
        return f"{fmean(values):.1f} ± {stdev(values):.1f}"
    text = f"{fmean(values):+.1f} ± {stdev(values):.1f}"
    return f"**{text}**" if sure(values) else text


def sure(values: Sequence[float]) -> bool:
    """Whether a 95 % interval of the mean leaves out zero."""
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return bool(abs(fmean(values)) > half)


def gaps(rows: Mapping[str, Mapping[int, Table]], label: str, other: str, name: str) -> list[float]:
    """A metric of a row minus that of another, paired by seed."""
    common = sorted(rows[label].keys() & rows[other].keys())
    return [100 * (rows[label][seed]["metrics"][name] - rows[other][seed]["metrics"][name]) for seed in common]


def _lines(rows: Mapping[str, Mapping[int, Table]], labels: Sequence[str]) -> list[str]:
    lines = []
    for label in labels:
        runs = [rows[label][seed] for seed in sorted(rows[label])]
        rate = "" if runs[0]["rate"] is None else f"{runs[0]['rate']:g}"
        cells = [label, rate, *(told(points(rows[label], name)) for name in (AVERAGE, LAST))]
        cells += [told(gaps(rows, label, FROZEN, LAST), sign=True) if FROZEN in rows else ""]
        cells += [
            f"{fmean(run['stored_numbers'] for run in runs):,.0f}",
            f"{fmean(run['cpu_seconds'] for run in runs):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


FROZEN = "NCM, cosine"


def _reading(rows: Mapping[str, Mapping[int, Table]], main: Sequence[str]) -> list[str]:
    found = []
    for released in [label for label in RELEASED if MAIN in rows and label in rows]:
        both = [gaps(rows, MAIN, released, name) for name in (AVERAGE, LAST)]
        higher = [sum(gap >= 0 for gap in some) for some in both]
        found.append(
            f"`corrected` minus `{released}`: average {told(both[0], sign=True)} (not lower at {higher[0]} of "
            f"{len(both[0])} seeds), last {told(both[1], sign=True)} (at {higher[1]})."
        )
    if MAIN in rows:
        ahead = [label for label in main if fmean(points(rows[label], LAST)) > fmean(points(rows[MAIN], LAST))]
        found.append(f"Rows with a higher last accuracy than `corrected`: {', '.join(ahead) or 'none'}.")
    if MAIN in rows and FROZEN in rows:
        gap = fmean(gaps(rows, MAIN, FROZEN, LAST))
        if abs(gap) < TELLING:
            found.append(
                f"Mind what this table can tell: at the rate that validation chooses, `corrected` is {gap:+.1f} points "
                "from class means of the frozen features. With so few images more training costs accuracy, so that the "
                "least is chosen, and no part of a method has much to act on."
            )
    return found


def _ablated(rows: Mapping[str, Mapping[int, Table]], label: str) -> str:
    cells = [label, *(told(points(rows[label], name)) for name in (AVERAGE, LAST))]
    cells += [told(gaps(rows, MAIN, label, name), sign=True) for name in (AVERAGE, LAST)]
    return f"| {' | '.join(cells)} |"


def _votes(rows: Mapping[str, Mapping[int, Table]]) -> list[str]:
    runs = rows[MAIN]
    lines = []
    for name in next(iter(runs.values()))["votes"]:
        values = [100 * runs[seed]["votes"][name] for seed in sorted(runs)]
        less = [own - other for own, other in zip(points(runs, LAST), values, strict=True)]
        lines.append(f"| {MAIN}, vote of the {name} |  | {told(values)} |  | {told(less, sign=True)} |")
    return lines


WITHOUT_ORTHOGONALITY = "corrected, no orthogonality"


def _interplay(rows: Mapping[str, Mapping[int, Table]]) -> list[str]:
    """With the orthogonality term and without it."""
    lines = ["| features | energy with / without | overlap with | without | with - without |", "|---|---|---|---|---|"]
    on, off = rows[MAIN], rows[WITHOUT_ORTHOGONALITY]
    seeds = sorted(on.keys() & off.keys())
    for branch in next(iter(on.values()))["interplay"]:
        both = [[runs[seed]["interplay"][branch] for seed in seeds] for runs in (on, off)]
        ratios = [one["energy"] / other["energy"] for one, other in zip(*both, strict=True)]
        change = [100 * (one["overlap"] - other["overlap"]) for one, other in zip(*both, strict=True)]
        overlaps = (f"{fmean(one['overlap'] for one in some):.3f}" for some in both)
        cells = [branch, ", ".join(f"{ratio:.2f}" for ratio in ratios), *overlaps, f"{told(change, sign=True)} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return [_ORTHOGONALITY, "\n".join(lines)]


_ORTHOGONALITY = """The kernel K_st = phi_s phi_t^T of current features of test samples, after the last task,
between tasks s and t: mean square of its entries (`energy`, with the term divided by without it, seed by seed) and
|K_st|^2 / (|K_ss| |K_tt|) (`overlap`), mean over all pairs of tasks. The term acts on adapters and prompts, not on
the fused feature."""


def _compared(rows: Mapping[str, Mapping[int, Table]], partial: Sequence[str]) -> str:
    kinds: dict[str, list[str]] = {"better than with": [], "worse than with": [], "not told from that with": []}
    for label in partial:
        gap = gaps(rows, MAIN, label, LAST)
        kind = "not told from that with"
        if len(gap) > 1 and sure(gap):
            kind = "better than with" if fmean(gap) > 0 else "worse than with"
        kinds[kind].append(label.removeprefix(f"{MAIN}, ").removeprefix("with "))
    listed = "; ".join(f"{kind}: {', '.join(names) or 'none'}" for kind, names in kinds.items())
    return f"By last accuracy `{MAIN}` is {listed}."
