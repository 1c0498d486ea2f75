"""How much of a network to train on real streams: `python -m benchmarks.magnitude_table DATA`.

Writes docs/magnitude_results.md. DATA is the folder of the shared data sets. Runs go to worker processes of one thread
each. What benchmarks/results/magnitude.json holds with the same settings is not run again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch.multiprocessing import get_context

from benchmarks.machine import RESULTS, floor
from benchmarks.magnitude_results_page import page
from benchmarks.magnitude_streams import SETTINGS, WIDTH, NineBlocks
from benchmarks.method_runs import Store
from benchmarks.tables import arguments_of
from forgetcast.heads.linear import Linear
from forgetcast.learn.loop import learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.learn.seeding import seed_everything
from forgetcast.methods.base import Model
from forgetcast.methods.registry import method_class
from forgetcast.metrics.matrix import all_metrics

Table = dict[str, Any]
SEEDS = (0, 1, 2)
OPTIMIZATION = Optimization(
    "sgd", learning_rate=0.05, epochs=6, batch_size=32, momentum=0.9, weight_decay=5e-4, schedule="cosine"
)
ADAPTIVE = {"least": 1, "low": 0.2, "high": 0.5, "order": "last", "guard": 0.75, "samples": 1024}
METHODS: dict[str, Mapping[str, Any]] = {
    "initialized": {},
    "frozen": {"specific": 1},
    "adaptive": ADAPTIVE,
    "adaptive, joint rows": {**ADAPTIVE, "rows": "joint"},
}
"""Options by what the table calls it: a method's name, and what is said of it after a comma."""
DOCS = Path(__file__).parents[1] / "docs" / "magnitude_results.md"


@dataclass(frozen=True)
class Run:
    """What is measured: a method on a stream, at a seed of classes, weights, and order of samples."""

    setting: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def key(self) -> str:
        """Its place in the JSON."""
        return f"{self.setting} / {self.method} / seed {self.seed}"

    @property
    def identity(self) -> Table:
        """All that decides its numbers, but for code and data."""
        return {**asdict(self), "optimization": asdict(OPTIMIZATION)}


def measured(run: Run, folder: Path) -> Table:
    """All that the page tells of a run."""
    started = process_time()
    setting = SETTINGS[run.setting]
    stream = setting.made(folder, run.seed)
    seed_everything(run.seed)
    model = Model(NineBlocks(setting.channels), Linear(WIDTH))
    method = method_class(run.method.partition(",")[0])(model, loss_outputs="task", **run.options)
    done = learn(method, stream, OPTIMIZATION, seed=run.seed)
    return {
        "split": stream.split_hash,
        "samples": [len(task.train) for task in stream.tasks],
        "metrics": all_metrics(done.task_incremental_matrix),
        "accuracy_matrix": done.task_incremental_matrix,
        "trainable_parameters": done.trainable_parameters,
        "decisions": method.decided(),
        "task_seconds": list(done.seconds),
        "cpu_seconds": process_time() - started,
    }


def work(given: tuple[Run, Path]) -> tuple[Run, Table]:
    """In a worker."""
    torch.set_num_threads(1)
    return given[0], measured(*given)


def measure(store: Store, folder: Path, settings: Sequence[str], workers: int) -> None:
    """The whole table."""
    store.all |= {"machine": floor(), "versions": {name: version(name) for name in ("torch", "numpy")}}
    store.all |= {"seeds": list(SEEDS), "optimization": asdict(OPTIMIZATION), "methods": METHODS}
    store.all |= {"settings": {name: SETTINGS[name].title for name in SETTINGS}}
    place = store.all.setdefault("runs", {})
    wanted = [Run(name, method, METHODS[method], seed) for seed, name, method in product(SEEDS, settings, METHODS)]
    missing = [run for run in wanted if place.get(run.key, {}).get("identity") != run.identity]
    with get_context("spawn").Pool(workers) as pool:
        for count, (run, found) in enumerate(pool.imap_unordered(work, [(run, folder) for run in missing]), 1):
            place[run.key] = {"identity": run.identity, **found}
            store.save()
            told = {name: f"{100 * found['metrics'][name]:.1f}" for name in ("last_accuracy", "first_minus_last")}
            print(f"{count} of {len(missing)}: {run.key}: {told}, {found['cpu_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = arguments_of(__doc__, list(SETTINGS)).parse_args()
    measurements = Store(RESULTS / "magnitude.json")
    if not arguments.page:
        measure(measurements, arguments.data, arguments.settings, arguments.workers)
    DOCS.write_text(page(measurements.all))
