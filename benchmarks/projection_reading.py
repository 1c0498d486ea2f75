"""What the table of gradient projection shows, in sentences whose figures come from the JSON."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.projection_page import CLASSIFIERS, CONTROLS, FORGETTING, LAST, NAMES, gains, sure, values
from benchmarks.projection_runs import Table, row_of

Pair = tuple[str, str]
TOLD = ("told", FORGETTING)
MEANS = ("means", LAST)


def reading(result: Table) -> list[str]:
    """One sentence or two for each thing that the table is there to show."""
    pairs = [(name, tuner) for name in result["settings"] for tuner in NAMES if gains(result, name, tuner, MEANS)]
    if not pairs:
        return []
    parts = (_forgetting, _last, _newest, _told, _first_task, _best, _gradients, _paper, _thresholds)
    return [sentence for part in parts if (sentence := part(result, pairs))]


def _forgetting(result: Table, pairs: Sequence[Pair]) -> str:
    shown = []
    for part, label in CLASSIFIERS.items():
        gaps = [gains(result, *pair, (part, FORGETTING)) for pair in pairs]
        lower = sum(fmean(gap) < 0 for gap in gaps)
        shown.append(
            f"of the {label} in {lower} of {len(pairs)} pairs (at every seed in {sum(max(gap) < 0 for gap in gaps)}), "
            f"{fmean(map(fmean, gaps)):+.1f} points on average"
        )
    return f"Mean forgetting is lower with projection {'; '.join(shown)}."


def _last(result: Table, pairs: Sequence[Pair]) -> str:
    shown = []
    for part, label in CLASSIFIERS.items():
        gaps = [gains(result, *pair, (part, LAST)) for pair in pairs]
        higher, lower = (sum(sure(gap) and sign * fmean(gap) > 0 for gap in gaps) for sign in (1, -1))
        shown.append(
            f"of the {label} in {sum(fmean(gap) >= 0 for gap in gaps)} of {len(pairs)} pairs, "
            f"{fmean(map(fmean, gaps)):+.1f} points on average (beyond the noise of seeds higher in {higher}, lower in "
            f"{lower})"
        )
    return f"Mean last accuracy is not lower {'; '.join(shown)}."


def _newest(result: Table, pairs: Sequence[Pair]) -> str:
    shown = []
    for name in _settings(pairs):
        own, free = (_mean_gain(result, pairs, name, (part, "learning_accuracy")) for part in ("told", "metrics"))
        shown.append(f"{name} {own:+.1f} among its own classes, {free:+.1f} among all seen")
    return f"Accuracy on the newest task changes by (mean over tuners, points): {'; '.join(shown)}."


def _told(result: Table, pairs: Sequence[Pair]) -> str:
    shown = []
    for name in _settings(pairs):
        plain = fmean(fmean(values(result, row_of(*pair), TOLD)) for pair in pairs if pair[0] == name)
        gap = _mean_gain(result, pairs, name, TOLD)
        shown.append(f"{name} {plain:.1f} without projection, {plain + gap:.1f} with it")
    return f"Forgetting with the task told, which is drift alone (mean over tuners, points): {'; '.join(shown)}."


def _first_task(result: Table, pairs: Sequence[Pair]) -> str:
    shown = []
    for name in _settings(pairs):
        first = values(result, row_of(name, "adapter", "first task"), MEANS)
        projected = values(result, row_of(name, "adapter", projection={}), MEANS)
        if first and projected:
            shown.append(f"{name} {fmean(projected):.1f} against {fmean(first):.1f}")
    if not shown:
        return ""
    return f"The projected adapter against one trained on the first task alone, class means, last: {'; '.join(shown)}."


def _best(result: Table, pairs: Sequence[Pair]) -> str:
    shown = []
    for name in _settings(pairs):
        rows = {
            f"{NAMES[tuner]}{label}": row_of(name, tuner, projection=options)
            for one, tuner in pairs
            if one == name
            for label, options in (("", None), (", projected", {}))
        }
        rows |= {label: row_of(name, tuner, learner) for label, tuner, learner in CONTROLS}
        found = {
            f"{label}, {classifier}": values(result, row, (part, LAST))
            for label, row in rows.items()
            for part, classifier in CLASSIFIERS.items()
        }
        best = max((fmean(numbers), label) for label, numbers in found.items() if numbers)
        shown.append(f"{name}: {best[1]} ({best[0]:.1f})")
    return f"Highest last accuracy, other projections aside: {'; '.join(shown)}."


def _gradients(result: Table, _: Sequence[Pair]) -> str:
    return _against(result, {"target": "gradient"}, "Gradients projected in the place of steps", ["adapter"])


def _paper(result: Table, _: Sequence[Pair]) -> str:
    return _against(result, {"conditions": "paper"}, "The paper's conditions", ["prefix", "prompt"])


def _thresholds(result: Table, _: Sequence[Pair]) -> str:
    setting, shown = result["ablated"], []
    for tuner in NAMES:
        rows = {
            value: values(
                result, row_of(setting, tuner, projection={"threshold": value} if value != 0.95 else {}), MEANS
            )
            for value in (0.8, 0.95, 0.99)
        }
        if all(rows.values()):
            shown.append(f"{NAMES[tuner]} {max(rows, key=lambda value: fmean(rows[value]))}")
    return (
        f"Of thresholds, the one with the highest last accuracy of class means on {setting}: {', '.join(shown)}."
        if shown
        else ""
    )


def _against(result: Table, options: Mapping[str, Any], what: str, tuners: Sequence[str]) -> str:
    setting, shown = result["ablated"], []
    for tuner in tuners:
        changes = []
        for metric in (("means", FORGETTING), MEANS):
            own, other = (values(result, row_of(setting, tuner, projection=one), metric) for one in ({}, options))
            changes += [f"{fmean(other) - fmean(own):+.1f}"] if own and other else []
        if len(changes) == 2:
            shown.append(f"{NAMES[tuner]} {' / '.join(changes)}")
    return f"{what} change forgetting / last accuracy of class means on {setting}: {', '.join(shown)}." if shown else ""


def _settings(pairs: Sequence[Pair]) -> list[str]:
    return list(dict.fromkeys(name for name, _ in pairs))


def _mean_gain(result: Table, pairs: Sequence[Pair], setting: str, metric: tuple[str, str]) -> float:
    return fmean(fmean(gains(result, *pair, metric)) for pair in pairs if pair[0] == setting)
