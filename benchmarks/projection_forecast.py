"""Forecasts of projected trainings: `python -m benchmarks.projection_forecast DATA` writes a table for the docs.

For each tuner and setting of the table of gradient projection: half of the tasks are learnt with projection; then the
next one is forecast, without projection and with it, before either is trained; then both are trained for real, from
the same parameters.
"""

import copy
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import forgetcast as fc
from benchmarks.machine import RESULTS
from benchmarks.method_runs import Store
from benchmarks.projection_page import NAMES
from benchmarks.projection_runs import Run, Table, method_of
from benchmarks.projection_settings import SETTINGS, Cached, stream_of
from forgetcast.forecast.network.result import NetworkForecast
from forgetcast.learn.loop import learn
from forgetcast.learn.seeding import seed_everything
from forgetcast.protect.projected import GradientProjection
from forgetcast.runs.upcoming import viewed

LEARNT, SEED, BUDGET, OLD = 5, 0, 0.15, 300
RATES = {"adapter": 3e-3, "lora": 3e-3, "prefix": 3e-2, "prompt": 3e-2}
HEAD_RATE = 3e-3
EPOCHS = 4
DOCS = Path(__file__).parents[1] / "docs" / "projection_forecasts.md"
HEAD = """# Forecasts of projected trainings

Written by `python -m benchmarks.projection_forecast DATA`; the numbers are in
`benchmarks/results/projection_forecast.json`. Settings, tuners and data are those of docs/projection_results.md.
{learnt} tasks are learnt with projection (seed {seed}); the next is forecast at {budget:.0%} of its training's
cost, with and without projection, before either is trained, and then trained for real from the same parameters,
{epochs} epochs of AdamW at one rate. `drift` is the relative change of the logits of {old} old samples on old
classes, |after - before| / |before|: their rows stand still, so that it is the tuner's alone; `cosine` is that
of forecast and measured drift; `accuracy` that of old answers among all classes, in points (before: once the
new outputs take part). New rows of the head learn at the tuner's rate, which is high for prefixes and prompts:
there old samples go to new classes whatever the features do.

{table}

{reading}
"""


def measured(run: Run, cached: Cached, folder: Path) -> Table:
    """Forecast and real drift of one task, with and without projection."""
    setting = SETTINGS[run.setting]
    stream = stream_of(cached, run.setting, run.seed)
    seed_everything(run.seed)
    method = method_of(run, setting, folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* of their directions free")
        learn(method, stream, run.optimization(), seed=run.seed, until=LEARNT)
    task = stream[LEARNT]
    method.model.head.grow(max(task.classes) + 1)  # type: ignore[operator]
    (protection,) = (part for part in method.protections if isinstance(part, GradientProjection))
    projected = protection.restraint(method.model)
    assert projected is not None
    earlier = np.concatenate([part.test for part in stream.tasks[:LEARNT]])
    earlier = earlier[np.linspace(0, len(earlier) - 1, min(OLD, len(earlier))).round().astype(np.int64)]
    inputs, outputs = torch.from_numpy(stream.source.inputs), torch.from_numpy(stream.outputs)
    old, new = ((inputs[places], outputs[places]) for places in (earlier, task.train))
    batch = setting.optimization.batch_size
    training = fc.AdamW(
        learning_rate=run.rate,
        steps=EPOCHS * -(-len(task.train) // batch),
        batch_size=batch,
        weight_decay=0.0,
        seed=run.seed,
        classes=tuple(task.classes),
    )
    model = viewed(method.model)
    names = {id(parameter): name for name, parameter in method.model.named_parameters()}
    own = {name: names[id(parameter)] for name, parameter in model.named_parameters()}

    def restraint(before: Any, step: Any) -> dict[str, torch.Tensor]:
        start, taken = ({own[name]: value for name, value in some.items()} for some in (before, step))
        found = projected(start, taken)
        return {name: found[own[name]] for name in step}

    found: Table = {"setting": run.setting, "tuner": run.tuner, "old": len(earlier), "steps": training.steps}
    for label, allowed in (("plain", None), ("projected", restraint)):
        seen = fc.forecast(model, old, new, training, budget=BUDGET, restraint=allowed)
        real = fc.forecast(copy.copy(model), old, new, training, budget=1.0, restraint=allowed, estimator="pilot")
        assert real.trust.exact
        found[label] = compared(seen, real, min(task.classes))
    return found


def compared(seen: NetworkForecast, real: NetworkForecast, classes: int) -> Table:
    """A forecast beside the real training; drift on the first so many outputs."""
    told, drift = seen.drift[:, :classes], real.drift[:, :classes]
    size = float(seen.logits_before[:, :classes].norm())
    return {
        "forecast_drift": float(told.norm()) / size,
        "drift": float(drift.norm()) / size,
        "cosine": float((told * drift).sum() / (told.norm() * drift.norm())),
        "accuracy_before": seen.accuracy_before,
        "forecast_accuracy": seen.accuracy,
        "accuracy": real.accuracy,
        "share_of_run": seen.share_of_run,
        "expected_cosine": seen.trust.expected_cosine,
    }


def page(result: Table) -> str:
    """The table, and how often it holds."""
    heads = (
        "setting | tuner | projection | forecast drift | drift | cosine | forecast accuracy | accuracy | before | cost"
    )
    lines, fewer, really = [], [], []
    for run in result["runs"].values():
        plain, projected = run["plain"], run["projected"]
        fewer.append(projected["forecast_drift"] < plain["forecast_drift"])
        really.append(projected["drift"] < plain["drift"])
        for label in ("plain", "projected"):
            row = run[label]
            accuracies = (f"{100 * row[name]:.1f}" for name in ("forecast_accuracy", "accuracy", "accuracy_before"))
            drifts = f"{row['forecast_drift']:.3f}", f"{row['drift']:.3f}", f"{row['cosine']:.2f}"
            first = (run["setting"], NAMES[run["tuner"]]) if label == "plain" else ("", "")
            lines.append(
                [*first, "no" if label == "plain" else "yes", *drifts, *accuracies, f"{row['share_of_run']:.0%}"]
            )
    rows = [run[label] for run in result["runs"].values() for label in ("plain", "projected")]
    ratios = [row["forecast_drift"] / row["drift"] for row in rows if row["drift"] > 1e-3]
    factor = max(max(ratio, 1 / ratio) for ratio in ratios)
    cosines = [row["cosine"] for row in rows]
    table = [f"| {heads} |", "|---" * (heads.count("|") + 1) + "|", *(f"| {' | '.join(line)} |" for line in lines)]
    reading = (
        f"The forecast drift is lower with projection in {sum(fewer)} of {len(fewer)} pairs, the measured one in "
        f"{sum(really)}. Its size is within a factor of {factor:.1f} of the measured one in all rows where that is "
        f"above 0.001; its direction is not to be relied on (median cosine {median(cosines):.2f}): the tuner's part of "
        "a drift is small beside the noise of a few samples here."
    )
    return HEAD.format(
        learnt=LEARNT, seed=SEED, budget=BUDGET, epochs=EPOCHS, old=OLD, table="\n".join(table), reading=reading
    )


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the shared data sets")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page from what is there")
    arguments = parser.parse_args()
    store = Store(RESULTS / "projection_forecast.json")
    known = store.all.setdefault("runs", {})
    for name in () if arguments.page else arguments.settings:
        data = SETTINGS[name].cached(arguments.data)
        for tuner in NAMES:
            run = Run(name, tuner, projection={}, rate=RATES[tuner], head_rate=HEAD_RATE, seed=SEED)
            told = store.kept(
                known,
                f"{name} / {tuner}",
                run.identity(data.hash) | {"epochs": EPOCHS, "learnt": LEARNT, "budget": BUDGET},
                lambda run=run, data=data: measured(run, data, arguments.data),
            )
            print(name, tuner, told, flush=True)
    DOCS.write_text(page(store.all))
