"""The table of rivals as a page; every figure and sentence in it comes from the JSON."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from benchmarks.ntk_cl_page import AVERAGE, LAST, Table, points, rule, sure, told, tried
from benchmarks.rival_reading import by_label, differences, foreseen, mean, noise, orderings, ranked, reading
from benchmarks.rival_rows import SEQUENTIAL
from benchmarks.rival_runs import TITLES
from forgetcast.metrics.matrix import DEFINITIONS
from forgetcast.runs.compare import DIRECTIONS

MEBI = 2**20
FORGETTING = [name for name in DEFINITIONS if name in DIRECTIONS]
HEAD = """# All methods side by side

Written by `python -m benchmarks.rival_table DATA`, the sentences included; the numbers, with every accuracy matrix, are
in `benchmarks/results/rivals.json`.

Class-incremental, {tasks} tasks, all seen classes to choose from, seeds {seeds}: each its own task order, start and
order of samples, the same for all rows; the samples themselves are the same at every seed. All rows have the same
pretrained model, frozen below its upper blocks, the same inputs (no augmentation), {epochs} epochs of batches of
{batch} of each task, and the same number of rates to choose from: AdamW without decay {adamw}, SGD (momentum 0.9,
decay 5e-4, cosine over epochs; EASE and MOS, as in their papers) {sgd}. A rate is chosen by average accuracy on
validation samples (a fifth of the training samples) of seed {tuning_seed}, which is no seed of the tables. Everything
else is a paper's or this project's default and was not tuned, but for what short runs ask for: EWC with a sampled
Fisher, 10 probes of the spectral regulariser, 10 epochs of MOS's alignment (its default is 30), a decay of 0.998 of
LAE, InfLoRA's energy sigma^4, and a budget of 0.5 of the advised method. Rehearsal keeps {kept} samples. Where a
method leaves the choice, the tuner is an adapter, and the loss runs over the task's own classes, but under rehearsal
over all seen.

These are small settings: a small model, few samples, few steps. What is published was measured with ViT-B/16, whole
data sets and up to 20 epochs with augmentation.

Of CIFAR-100 the samples are the first images of each class, and they stand in an order of likeness: class means of
frozen features (at 224 px, 30 training and 10 test images a class) have 56.2 points on the first ones and 51.8 ± 1.8 on
images drawn at random. Rows are compared on the same images; their levels are those of these images."""

ABOUT = """`average` is `average_accuracy` (mean over stages of the accuracy on all classes seen), `last` is
`last_accuracy`, both in points, mean ± standard deviation over seeds. `trains` are parameters that train in the last
task, or in the first where a row trains in that alone; `stored` are numbers in the state after the first and after the
last task, the frozen weights of the upper blocks included; `s` are processor seconds of the whole run, evaluation
included; `peak` is how far the resident set of the run's process rises, in MiB, inputs included."""

COMPARED = """Differences are paired by seed, as `forgetcast compare` does it: their mean in points [95 % bootstrap
interval], and at how many seeds the row is better, equal, worse. Of few seeds this interval is too narrow: that of
three runs from the least to the greatest of three differences, which holds the true one in three of four cases. So
**bold** is where a 95 % interval by Student's t leaves out zero. `best` is the row with the highest last accuracy of
those that do not train on all data together."""


def page(result: Table) -> str:
    """The whole page, of the data sets that have runs."""
    result = result | {"sets": {name: found for name, found in result["sets"].items() if found["runs"]}}
    training = result["optimizations"]["adamw"]
    rates = {name: " / ".join(f"{rate:g}" for rate in some) for name, some in result["rates"].items()}
    head = HEAD.format(
        **{name: result[name] for name in ("tasks", "kept", "tuning_seed")},
        seeds=", ".join(map(str, result["seeds"])),
        epochs=training["epochs"],
        batch=training["batch_size"],
        **rates,
    )
    parts = [head, ABOUT, COMPARED]
    for found in result["sets"].values():
        parts += of_set(found)
    parts += ["## Published orderings", *orderings(result)]
    if any(found["forecasts"] for found in result["sets"].values()):
        parts += ["## Forecasts", *foreseen(result)]
    left = "; ".join(f"`{name}`: {why}" for name, why in result["left_out"].items())
    parts += ["## Left out and spent", f"Methods without a row: {left}.", unmeasured(result), spent(result)]
    return "\n\n".join(filter(None, parts)) + "\n"


def of_set(found: Table) -> list[str]:
    """All that is told of a data set."""
    rows = by_label(found)
    order = ranked(rows)
    size = f"{found['samples']} training samples a class, {found['test_samples']:,} test samples."
    parts = [f"## {found['title']}", size, accuracies(rows, order)]
    parts += ["Forgetting, by all definitions of `forgetcast.metrics`, in points:", forgotten(rows, order)]
    if SEQUENTIAL in rows:
        best = next(label for label in order if not joint(found, label))
        parts += [f"Differences; best is `{best}`:", compared(rows, order, best), *reading(rows, order, best)]
    parts += [noise(found, rows)]
    absent = [f"{label}: {why}" for label, why in found["absent"].items()]
    absent += [f"{key} failed: {one['failed']}" for key, one in found["runs"].items() if "failed" in one]
    parts += [f"Not measured here: {'; '.join(absent)}."] if absent else []
    if found["tuning"]:
        parts += ["Validation average / last at the rates tried; **bold** is taken:", *tried(found), edges(found)]
    return parts


def joint(found: Table, label: str) -> bool:
    """Whether a row trains on all data together."""
    return bool(found["methods"][label] == "joint")


def table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    head = f"| {' | '.join(titles)} |"
    return "\n".join([head, rule(head), *(f"| {' | '.join(line)} |" for line in lines)])


def accuracies(rows: Any, order: Sequence[str]) -> str:
    """Accuracy and cost of every row."""
    lines = []
    for label in order:
        runs = list(rows[label].values())
        trains = next((count for count in reversed(runs[0]["trainable_parameters"]) if count), 0)
        stored = runs[0]["stored_numbers"]
        lines.append(
            [
                label,
                "" if runs[0]["rate"] is None else f"{runs[0]['rate']:g}",
                *(told(points(rows[label], name)) for name in (AVERAGE, LAST)),
                f"{trains:,}",
                f"{stored[0]:,}",
                f"{stored[-1]:,}",
                f"{fmean(run['cpu_seconds'] for run in runs):.0f}",
                f"{fmean(run['peak_memory'] for run in runs) / MEBI:.0f}",
            ]
        )
    return table(["row", "rate", "average", "last", "trains", "stored: first", "last task", "s", "peak"], lines)


def forgotten(rows: Any, order: Sequence[str]) -> str:
    """Every definition of forgetting, and the accuracy on each task just after it was learnt."""
    names = ["learning_accuracy", *FORGETTING]
    lines = [[label, *(told(points(rows[label], name)) for name in names)] for label in order]
    return table(["row", *(f"`{name}`" for name in names)], lines)


def compared(rows: Any, order: Sequence[str], best: str) -> str:
    """Differences to the best row and to sequential fine-tuning."""
    lines = []
    for label in order:
        cells = [label]
        for other, name in ((best, LAST), (SEQUENTIAL, LAST), (SEQUENTIAL, AVERAGE), (SEQUENTIAL, "first_minus_last")):
            cells.append("" if label == other else difference(rows, other, label, name))
        lines.append(cells)
    of = f"`{SEQUENTIAL}`"
    titles = ["row", "last - best", f"last - {of}", f"average - {of}", f"`first_minus_last` - {of}"]
    return table(titles, lines)


def difference(rows: Any, first: str, second: str, name: str) -> str:
    """The second row minus the first."""
    found = differences(rows, first, second, name)
    if found.mean is None or found.interval is None:
        return ""
    low, high = (100 * end for end in found.interval)
    common = found.seeds
    gaps = [rows[second][seed]["metrics"][name] - rows[first][seed]["metrics"][name] for seed in common]
    text = f"{mean(found)} [{low:+.1f}, {high:+.1f}]"
    return f"{f'**{text}**' if sure(gaps) else text} {found.wins}/{found.ties}/{found.losses}"


def edges(found: Table) -> str:
    """At which rows a rate beyond those tried might be better."""
    reached: dict[str, set[float]] = {}
    for one in found["tuning"].values():
        reached.setdefault(one["label"], set()).add(one["rate"])
    rates = found["rates"]
    low, high = ([label for label, some in reached.items() if rates[label] == end(some)] for end in (min, max))
    return f"At the lowest rate tried: {', '.join(low) or 'none'}. At the highest: {', '.join(high) or 'none'}."


def unmeasured(result: Table) -> str:
    """Data sets and forecasts of the protocol that have not been run."""
    sets = result["sets"]
    without = [title for name, title in TITLES.items() if name in sets and not sets[name]["forecasts"]]
    parts = [
        *(f"the data set {title}" for name, title in TITLES.items() if name not in sets),
        *(f"forecasts of {title}" for title in without),
    ]
    return f"Not run so far: {'; '.join(parts)}." if parts else ""


def spent(result: Table) -> str:
    """What all of it took."""
    sets = result["sets"].values()
    seeds = [runs for found in sets for runs in found["forecasts"].values()]
    runs = [one for part in ("tuning", "runs") for found in sets for one in found[part].values()]
    seconds = sum(one["cpu_seconds"] for one in (*runs, *(one for some in seeds for one in some.values())))
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    what = "runs and their forecasts" if seeds else "runs"
    return f"{len(runs)} {what} took {seconds / 3600:.1f} hours of one core; {versions}."
