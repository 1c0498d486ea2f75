"""What the table of gradient projection shows, in sentences whose figures come from the JSON."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.projection_page import CONTROLS, FORGETTING, LAST, NAMES, gains, sure, values
from benchmarks.projection_runs import Table, row_of

Pair = tuple[str, str]
TOLD = ("told", "first_minus_last")


def reading(result: Table) -> list[str]:
    """One sentence or two for each thing that the table is there to show."""
    pairs = [(name, tuner) for name in result["settings"] for tuner in NAMES if gains(result, name, tuner, LAST)]
    if not pairs:
        return []
    parts = (_forgetting, _last, _newest, _told, _first_task, _best, _gradients, _paper, _thresholds)
    return [sentence for part in parts if (sentence := part(result, pairs))]


def _forgetting(result: Table, pairs: Sequence[Pair]) -> str:
    gaps = [gains(result, *pair, FORGETTING) for pair in pairs]
    lower = sum(fmean(gap) < 0 for gap in gaps)
    return (
        f"Mean forgetting is lower with projection in {lower} of {len(pairs)} pairs (at every seed in "
        f"{sum(max(gap) < 0 for gap in gaps)}); it changes by {fmean(map(fmean, gaps)):+.1f} points on average."
    )


def _last(result: Table, pairs: Sequence[Pair]) -> str:
    gaps = [gains(result, *pair, LAST) for pair in pairs]
    higher, lower = (sum(sure(gap) and sign * fmean(gap) > 0 for gap in gaps) for sign in (1, -1))
    return (
        f"Mean last accuracy is not lower in {sum(fmean(gap) >= 0 for gap in gaps)} of {len(pairs)} pairs, "
        f"{fmean(map(fmean, gaps)):+.1f} points on average; beyond the noise of seeds it is higher in {higher} and "
        f"lower in {lower}."
    )


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
    gaps = [
        fmean(values(result, row_of(*pair, projection={}), LAST)) - fmean(first)
        for pair in pairs
        if (first := values(result, row_of(*pair, "first task"), LAST))
    ]
    if not gaps:
        return ""
    return (
        "Against the same tuner trained on the first task alone, whose features cannot drift, the projected one has a "
        f"higher last accuracy in {sum(gap > 0 for gap in gaps)} of {len(gaps)}, {fmean(gaps):+.1f} points on average."
    )


def _best(result: Table, pairs: Sequence[Pair]) -> str:
    shown = []
    for name in _settings(pairs):
        tuned = {
            NAMES[tuner] + label: values(result, row_of(name, tuner, projection=options), LAST)
            for one, tuner in pairs
            if one == name
            for label, options in (("", None), (", projected", {}))
        }
        controls = {label: values(result, row_of(name, tuner, learner), LAST) for label, tuner, learner in CONTROLS}
        best = [max((fmean(found), label) for label, found in some.items() if found) for some in (tuned, controls)]
        shown.append(f"{name}: {'; of the controls '.join(f'{label} ({value:.1f})' for value, label in best)}")
    return f"Highest last accuracy: {'. '.join(shown)}." if shown else ""


def _gradients(result: Table, _: Sequence[Pair]) -> str:
    return _against(result, {"target": "gradient"}, "Gradients projected in the place of steps", list(NAMES))


def _paper(result: Table, _: Sequence[Pair]) -> str:
    return _against(result, {"conditions": "paper"}, "The paper's conditions", ["prefix", "prompt"])


def _thresholds(result: Table, _: Sequence[Pair]) -> str:
    setting, shown = result["ablated"], []
    for tuner in NAMES:
        rows = {
            value: values(
                result, row_of(setting, tuner, projection={"threshold": value} if value != 0.95 else {}), LAST
            )
            for value in (0.8, 0.9, 0.95, 0.99)
        }
        if all(rows.values()):
            shown.append(f"{NAMES[tuner]} {max(rows, key=lambda value: fmean(rows[value]))}")
    return f"Of thresholds, the one with the highest last accuracy on {setting}: {', '.join(shown)}." if shown else ""


def _against(result: Table, options: Mapping[str, Any], what: str, tuners: Sequence[str]) -> str:
    setting, shown = result["ablated"], []
    for tuner in tuners:
        changes = []
        for metric in (FORGETTING, LAST):
            own, other = (values(result, row_of(setting, tuner, projection=one), metric) for one in ({}, options))
            changes += [f"{fmean(other) - fmean(own):+.1f}"] if own and other else []
        if len(changes) == 2:
            shown.append(f"{NAMES[tuner]} {' / '.join(changes)}")
    return f"{what} change forgetting / last accuracy on {setting}: {', '.join(shown)}." if shown else ""


def _settings(pairs: Sequence[Pair]) -> list[str]:
    return list(dict.fromkeys(name for name, _ in pairs))


def _mean_gain(result: Table, pairs: Sequence[Pair], setting: str, metric: tuple[str, str]) -> float:
    return fmean(fmean(gains(result, *pair, metric)) for pair in pairs if pair[0] == setting)
