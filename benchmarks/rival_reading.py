"""What the table of rivals shows, in sentences whose figures come from the JSON."""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, median, stdev

from benchmarks.ntk_cl_page import LAST, Table, points, rule
from benchmarks.rival_agreement import PERMUTATIONS, agreement, transitions_of
from benchmarks.rival_rows import PUBLISHED, SEQUENTIAL, Ordering
from forgetcast.runs.compare import Difference, compare

Rows = Mapping[str, Mapping[int, Table]]
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"


def by_label(found: Table) -> dict[str, dict[int, Table]]:
    """Runs of each row of a data set by seed, but for those that failed."""
    rows: dict[str, dict[int, Table]] = {}
    for one in found["runs"].values():
        if "failed" not in one:
            rows.setdefault(one["label"], {})[one["seed"]] = one
    return rows


def differences(rows: Rows, first: str, second: str, name: str) -> Difference:
    """The second row minus the first, as `forgetcast compare` has it."""
    records = [
        {"recipe": {"name": label}, "seed": seed, "state": "finished", "metrics": run["metrics"]}
        for label in (first, second)
        for seed, run in sorted(rows[label].items())
    ]
    return compare(records, name).differences[0]


def mean(found: Difference) -> str:
    """Of a difference, in points."""
    return "" if found.mean is None else f"{100 * found.mean:+.1f}"


def ranked(rows: Rows) -> list[str]:
    """Labels, that with the highest last accuracy first."""
    return sorted(rows, key=lambda label: -fmean(points(rows[label], LAST)))


def side(found: Difference) -> int:
    """1 where the second row is higher, -1 where the first, 0 where the interval has zero in it."""
    if found.interval is None or found.interval[0] <= 0 <= found.interval[1]:
        return 0
    return 1 if found.interval[0] > 0 else -1


def reading(rows: Rows, order: Sequence[str], best: str) -> list[str]:
    """Who is not told from the best, and who is above sequential fine-tuning or below it."""
    near = [label for label in order if label != best and side(differences(rows, best, label, LAST)) == 0]
    above, below = (
        [
            label
            for label in order
            if label != SEQUENTIAL and side(differences(rows, SEQUENTIAL, label, LAST)) == direction
        ]
        for direction in (1, -1)
    )
    return [
        f"Not told from `{best}` by last accuracy: {', '.join(near) or 'none'}.",
        f"Above `{SEQUENTIAL}` by last accuracy: {', '.join(above) or 'none'}. Below it: {', '.join(below) or 'none'}.",
    ]


def noise(found: Table, rows: Rows) -> str:
    """How far seeds are apart, and how far test samples could be."""
    between = {label: stdev(points(runs, LAST)) for label, runs in rows.items() if len(runs) > 1}
    if not between:
        return ""
    widest = max(between, key=lambda label: between[label])
    share = median(fmean(points(runs, LAST)) for runs in rows.values()) / 100
    error = 100 * sqrt(share * (1 - share) / found["test_samples"])
    return (
        f"Between seeds the last accuracy of a row has a standard deviation of {median(between.values()):.1f} points "
        f"(median; largest {between[widest]:.1f}, {widest}). The test samples, the same at every seed, add a standard "
        f"error of {error:.1f} points to the median row, which all rows share in good part."
    )


def orderings(result: Table) -> list[str]:
    """Which of the published orderings hold."""
    names = [found["title"].partition(":")[0] for found in result["sets"].values()]
    lines, counts = [], {name: dict.fromkeys((HOLDS, FAILS, UNDECIDED), 0) for name in names}
    for one in PUBLISHED:
        cells = [f"{one.better} > {one.worse}"]
        for name, found in zip(names, result["sets"].values(), strict=True):
            verdict, told = judged(found, one)
            if verdict:
                counts[name][verdict] += 1
            cells.append(f"{verdict} {told}".strip())
        lines.append(f"| {' | '.join([*cells, one.source])} |")
    head = f"| ordering | {' | '.join(names)} | source |"
    sums = "; ".join(
        f"{name}: {', '.join(f'{count} {verdict}' for verdict, count in own.items())}" for name, own in counts.items()
    )
    return [_ORDERINGS, "\n".join([head, rule(head), *lines]), f"In all: {sums}."]


_ORDERINGS = """What published tables say of last accuracies, and the difference here in points [95 % bootstrap
interval, paired by seed]: an ordering holds or not where the interval leaves out zero, and is undecided elsewhere.
Published numbers were measured with a larger model on more data; two published tables contradict each other in one
pair."""


def judged(found: Table, one: Ordering) -> tuple[str, str]:
    """Verdict, and the difference that it rests on; nothing where a row was not measured."""
    rows = by_label(found)
    if not {one.better, one.worse} <= rows.keys():
        return "", ""
    gap = differences(rows, one.worse, one.better, LAST)
    if gap.interval is None:
        return "", ""
    low, high = (100 * end for end in gap.interval)
    return {1: HOLDS, -1: FAILS, 0: UNDECIDED}[side(gap)], f"({mean(gap)} [{low:+.1f}, {high:+.1f}])"


def foreseen(result: Table) -> list[str]:
    """Forecast beside measured drops, and whether they order methods alike."""
    sets = {name: found for name, found in result["sets"].items() if found["forecasts"]}
    parts = [_FORECASTS.format(budget=result["budget"], old=result["old"], permutations=PERMUTATIONS)]
    for followed, title in (
        (True, "Rows that a forecast follows"),
        (False, "With rows whose protection it leaves out"),
    ):
        lines = []
        for found in sets.values():
            name = found["title"].partition(":")[0]
            lines.append(_agreement(name, transitions_of(found["forecasts"], followed=followed)))
        if len(sets) > 1:
            every = [one for found in sets.values() for one in transitions_of(found["forecasts"], followed=followed)]
            lines.append(_agreement("all", every))
        head = f"| {title} | rows | transitions | mean tau | pairs in order | p |"
        parts.append("\n".join([head, rule(head), *filter(None, lines)]))
    for found in sets.values():
        parts += [f"### {found['title'].partition(':')[0]}", _drops(found), _wrong_by(found), _unsupported(found)]
    return parts


_FORECASTS = """Before each task but the first, `forecast` says what the training of it will do to the accuracy on
earlier tasks, at {budget:.0%} of the training's cost (in passes) and on {old} old test samples; then the task is
trained, and the drop measured on all old test samples. The model, the training and the restraint of steps are taken
from the method as `forgetcast forecast` takes them. `tau` is Kendall's tau-b between forecast and measured drops of
all rows at one transition, in the mean over transitions and seeds; `pairs` the share of pairs of rows with different
measured drops that the forecast orders rightly; p is one-sided, by {permutations:,} permutations of whole rows."""


def _agreement(name: str, transitions: Sequence[Mapping[str, tuple[float, float]]]) -> str:
    found = agreement(transitions)
    if found is None:
        return ""
    counts = len(found["labels"]), found["transitions"]
    cells = *map(str, counts), f"{found['tau']:.2f}", f"{found['right']:.0%}", f"{found['p']:.4f}"
    return f"| {' | '.join([name, *cells])} |"


def _drops(found: Table) -> str:
    """Of each row, forecast and measured drops at each transition, in the mean over seeds."""
    by_label: dict[str, list[Table]] = {}
    for runs in found["forecasts"].values():
        for one in runs.values():
            if "transitions" in one:
                by_label.setdefault(one["label"], []).append(one)
    count = max((len(runs[0]["transitions"]) for runs in by_label.values()), default=0)
    head = f"| row: forecast (measured), points | {' | '.join(f'task {k + 2}' for k in range(count))} | left out |"
    lines = []
    for label, runs in by_label.items():
        cells = []
        for index in range(count):
            told, real = (
                100 * fmean(run["transitions"][index][side] for run in runs) for side in ("forecast", "measured")
            )
            cells.append(f"{told:z.1f} ({real:z.1f})")
        left = "; ".join(text.partition(" of ")[0].removeprefix("the protection ") for text in runs[0]["left_out"])
        lines.append(f"| {' | '.join([label, *cells, left])} |")
    return "\n".join([head, rule(head), *lines])


def _wrong_by(found: Table) -> str:
    """How far off forecasts are, those called to be trusted and the others, of the rows that they follow."""
    every = [run for runs in found["forecasts"].values() for run in runs.values() if not run.get("left_out")]
    steps = [one for run in every for one in run.get("transitions", ())]
    told = []
    for name, trusted in (("to be trusted", True), ("not to be trusted", False)):
        gaps = [100 * (one["forecast"] - one["measured"]) for one in steps if one["trusted"] is trusted]
        if gaps:
            wrong, lean = fmean(map(abs, gaps)), fmean(gaps)
            told.append(f"{len(gaps)} called {name} are off by {wrong:.1f} points on average ({lean:+.1f} with sign)")
    return f"Of the forecasts of rows that they follow, {'; '.join(told)}." if told else ""


def _unsupported(found: Table) -> str:
    reasons: dict[str, str] = {}
    for runs in found["forecasts"].values():
        reasons |= {one["label"]: one["unsupported"] for one in runs.values() if "unsupported" in one}
    told = "; ".join(f"{label}: {why}" for label, why in reasons.items())
    return f"No forecast: {told}." if told else ""
