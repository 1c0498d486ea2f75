"""What the results table shows, in sentences whose figures come from the JSON."""

from math import sqrt
from statistics import fmean, median, stdev

from benchmarks.method_page import CEILING, Table, minus, spread, told, values

PENALTIES = ("ewc", "kronecker_ewc", "si")
PLACED = ", placed rows"
SESSION = ", first session"


def reading(table: Table) -> list[str]:
    """One sentence or two for each thing that the table is there to show."""
    parts = (_order, _ceiling, _closed_forms, _penalties, _dark_replay, _placed, _session, _noise)
    return [sentence for part in parts if (sentence := part(table))]


def _order(table: Table) -> str:
    labels = ("ranpac", "ncm", "sequential")
    columns = [values(table, label) for label in labels]
    held = sum(first >= second >= third for first, second, third in zip(*columns, strict=True))
    shown = " ≥ ".join(f"{label} ({_mean(table, label)})" for label in labels)
    return f"{shown} holds at {held} of {len(columns[0])} seeds."


def _ceiling(table: Table) -> str:
    gaps = {label: minus(table, label, CEILING) for label in table["rows"] if label != CEILING}
    higher = sorted((label for label, (mean, _) in gaps.items() if mean > 0), key=lambda label: -gaps[label][0])
    above = "; ".join(f"{label} {_signed(gaps[label])}" for label in higher) or "none"
    beyond = [label for label in higher if gaps[label][0] > gaps[label][1]]
    verdict = f"Beyond noise: {', '.join(beyond)}" if beyond else "None is above it beyond noise"
    twice = table["checks"][f"{CEILING}: twice the epochs"]["last_accuracy"]
    once = max(entry["last_accuracy"] for entry in table["tuning"][CEILING].values())
    return (
        f"The ceiling is {spread(values(table, CEILING))}; with twice the epochs it has {100 * twice:.1f} on "
        f"validation samples, with those of the table {100 * once:.1f}. Rows with a higher mean: {above}. {verdict}. "
        f"The fair control `joint` is at {_signed(gaps['joint'])}: a lead of that size over gradient methods is class "
        "of functions and convergence, not memory."
    )


def _closed_forms(table: Table) -> str:
    parts = []
    for label in ("analytic", "ranpac"):
        check = table["checks"][f"{label}: tasks against all at once"]
        parts.append(
            f"{label} by {check['relative_gap']:.0e} of the largest logit, {check['same_answers']:.2%} same answers"
        )
    return f"Closed forms are their own joint training. Task by task and all at once differ: {'; '.join(parts)}."


def _penalties(table: Table) -> str:
    labels = ("sequential", "probe", *PENALTIES)
    shown = ", ".join(f"{label} {_mean(table, label)} ({fmean(told(table, label)):.1f})" for label in labels)
    tried = {key: 100 * check["last_accuracy"] for key, check in table["checks"].items() if ": strength" in key}
    best = max(tried, key=lambda key: tried[key])
    return (
        "Penalties on weights stay far below the ceiling under a head that all tasks share; in brackets with the task "
        f"told: {shown}. Of other strengths (1 to 1e6, on validation samples) the best is {best} with "
        f"{tried[best]:.1f}."
    )


def _dark_replay(table: Table) -> str:
    labels = ("der", "der, all outputs from the start", "der++", "replay")
    shown = "; ".join(f"{label} {_mean(table, label)}" for label in labels)
    return (
        "DER without labels forgets under a head that grows, because the logits it stored say nothing of later "
        f"outputs, which may then win on old samples: {shown}. "
        f"With the task told DER has {fmean(told(table, 'der')):.1f}."
    )


def _placed(table: Table) -> str:
    gaps = {
        label.removesuffix(PLACED): minus(table, label, label.removesuffix(PLACED))
        for label in table["rows"]
        if label.endswith(PLACED)
    }
    ordered = sorted(gaps, key=lambda label: -gaps[label][0])
    return f"Placed rows change the last accuracy: {'; '.join(f'{label} {_signed(gaps[label])}' for label in ordered)}."


def _session(table: Table) -> str:
    labels = [label for label in ("ranpac", "simplecil") if label + SESSION in table["rows"]]
    shown = "; ".join(f"{label} {_signed(minus(table, label + SESSION, label))}" for label in labels)
    return f"A first session (on the first task's classes alone) changes: {shown}." if labels else ""


def _noise(table: Table) -> str:
    between = [stdev(values(table, label)) for label in table["rows"]]
    samples, share = table["test_samples"], fmean(values(table, CEILING)) / 100
    return (
        f"Between seeds the last accuracy of a row has a standard deviation of {median(between):.1f} (median; largest "
        f"{max(between):.1f}); the {samples:,} test samples give the ceiling a standard error of "
        f"{100 * sqrt(share * (1 - share) / samples):.1f}."
    )


def _mean(table: Table, label: str) -> str:
    return f"{fmean(values(table, label)):.1f}"


def _signed(gap: tuple[float, float]) -> str:
    return f"{gap[0]:+.1f} ± {gap[1]:.1f}"
