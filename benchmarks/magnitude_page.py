"""The page of benchmarks/magnitude_simulation.py; every figure comes from the JSON."""

from collections.abc import Mapping, Sequence
from math import floor, log10
from typing import Any

Entry = Mapping[str, Any]

HEAD = """# Update magnitude: closed forms beside simulations

Written by `python -m benchmarks.magnitude_simulation`; the numbers are in
`benchmarks/results/magnitude_simulation.json`. What the formulas say: docs/magnitude.md.

Every setting is simulated {draws:,} times in float64: Gaussian features, labels with Gaussian noise, and the exact end
of each training, the solution nearest to its start or least squares. Cells are

    closed form / mean of the draws ± its standard error (relative error)

"""

SUMMARY = """A row meets the bar where its relative error is no larger. `differences` are the root mean square of
(simulated - closed) / standard error, 1 if chance alone separates the two: a sharper test than the bar."""

TRANSITIONS = """p shared and p_2 task-specific parameters, n samples of the new task, noise sigma. `distance` is
|u_2 - u_1| and |q_2 - q_1|, of tasks with |u_1| = |q_1| = 1 in random directions. F is forgetting of task 1, G the
error on task 2. Task 1 is learnt by all parameters from zero, with n_1 samples:"""

TEXTS = {
    "optimum": """`optimal_specific`, frozen training with more parameters than samples, at fixed xi = e_q - D_q and
eta = d_u + sigma^2. The best integer is that of the closed F on all integers from n + 2 to 50 n, the rest is simulated;
the ends of the plateau, rounded, are where forgetting is a tenth short of F*.""",
    "crossings": """`crossing` and `crossing_of_forgetting`: the simulated difference of frozen and initialized
training at six distances, not chosen by the closed form, in the same draws; zero on a line between the two around its
change of sign. And `crossing_cosine`: the cosine of the shared parameters' mean gradients at zero (50 samples a draw)
of two tasks that are the simulated distance apart, beside that of the closed one.""",
    "sequences": """`sequence`: T tasks one after the other, random directions with |u_t| = |q_t| = 1, from q = 0.
Frozen training keeps u at the tasks' mean, initialized starts from zero. Errors are those of the trained part.""",
    "step_lengths": """`expected_step_lengths`: the step with the least mean error over all draws along the way from
zero to the solution of task 2, |theta_2| = 2. `step_length`: beside a search on the values of two quadratics whose
curvatures lie between 0.01 and 10.""",
}
TITLES = {
    "transitions": "Two tasks",
    "optimum": "The optimal number",
    "crossings": "Frozen or initialized",
    "sequences": "Sequences",
    "step_lengths": "Step lengths",
}
INPUTS = ("e_u", "e_q", "d_u", "d_q")
OUTCOMES = tuple(f"{mode} {what}" for mode in ("frozen", "initialized") for what in "FG")


def page(result: Mapping[str, Any]) -> str:
    """The page."""
    parts = [HEAD.format(draws=result["draws"]).strip(), SUMMARY, _summary(result["summary"])]
    transitions = result["rows"]["transitions"]
    learnt, given = ([row for row in transitions if ("n_1=" in row["setting"]) == first] for first in (True, False))
    parts += [
        f"## {TITLES['transitions']}",
        TRANSITIONS,
        _wide(learnt, OUTCOMES),
        "What task 1 leaves (`FirstTask.then`):",
        _wide(learnt, INPUTS),
        "The same with the end of task 1 given, at a distance of 0.5 from it in either part:",
        _wide(given, OUTCOMES),
    ]
    for name, text in TEXTS.items():
        parts += [f"## {TITLES[name]}", text, _long(result["rows"][name])]
    minutes = result["cpu_seconds"] / 60
    parts.append(f"Seed {result['seed']}, {minutes:.1f} minutes of one core; torch {result['machine']['torch']}.")
    return "\n\n".join(parts) + "\n"


def _summary(summary: Mapping[str, Entry]) -> str:
    lines = [
        [
            TITLES[name],
            f"{100 * part['bar']:g} %",
            f"{part['within_bar']} of {part['rows']}",
            f"{100 * part['worst_relative_error']:.2f} %",
            f"{100 * part['largest_relative_standard_error']:.2f} %",
            f"{part['differences_in_standard_errors']:.2f}",
        ]
        for name, part in summary.items()
    ]
    return _table(
        "| bar | rows that meet it | worst relative error | largest relative standard error | differences", lines
    )


def _wide(rows: Sequence[Entry], quantities: Sequence[str]) -> str:
    """One line a setting."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    cells = {(row["setting"], row["quantity"]): _cell(row) for row in rows}
    lines = [[setting, *(cells.get((setting, quantity), "") for quantity in quantities)] for setting in settings]
    return _table(f"setting | {' | '.join(quantities)}", lines)


def _long(rows: Sequence[Entry]) -> str:
    """One line a row."""
    return _table("setting | quantity | ", [[row["setting"], row["quantity"], _cell(row)] for row in rows])


def _cell(row: Entry) -> str:
    values, error, spread = [row["closed"], row["simulated"]], row["standard_error"], ""
    digits = 1 - floor(log10(error)) if error else 4
    if error:
        spread = f" ± {error:.{digits}f}"
    mark = {"bar": "", "noise": ", within 3 standard errors", "no": ", **does not hold**"}[row["holds"]]
    relative = f"{100 * row['relative_error']:.2f} %"
    return f"{' / '.join(f'{value:.{digits}f}' for value in values)}{spread} ({relative}{mark})"


def _table(heads: str, lines: Sequence[Sequence[str]]) -> str:
    columns = heads.count("|") + 1
    return "\n".join([f"| {heads} |", "|---" * columns + "|", *(f"| {' | '.join(line)} |" for line in lines)])
