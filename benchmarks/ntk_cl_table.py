"""NTK-CL beside other methods, and what each of its parts gives: `python -m benchmarks.ntk_cl_table DATA`.

Writes docs/ntk_cl_results.md. DATA is the folder of the shared data sets. Runs go to worker processes of one thread
each. What benchmarks/results/ntk_cl.json holds with the same settings is not run again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

import torch
from torch.multiprocessing import get_context

from benchmarks.machine import RESULTS, floor
from benchmarks.method_runs import Store
from benchmarks.ntk_cl_page import page
from benchmarks.ntk_cl_rows import ROWS, SETTING, TUNERS, Row
from benchmarks.projection_runs import Features, Table
from benchmarks.projection_settings import Cached, stream_of
from benchmarks.rows import chosen, complete
from benchmarks.tables import arguments_of
from forgetcast.heads.linear import Linear
from forgetcast.heads.sectioned import Sectioned
from forgetcast.learn.cost import stored_numbers
from forgetcast.learn.loop import learn
from forgetcast.learn.seeding import seed_everything
from forgetcast.methods.base import Method
from forgetcast.methods.ntk_cl import NTKCL
from forgetcast.metrics.matrix import all_metrics
from forgetcast.modes import evaluating
from forgetcast.streams.stream import Stream
from forgetcast.tangent.blocks import TaskKernels
from forgetcast.tuners.fused import FusedSections

SEEDS = (0, 1, 2)
TUNING_SEED = 100
VOTES: Mapping[str, tuple[float, float]] = {"averaged alone": (1.0, 0.0), "current alone": (0.0, 1.0)}
"""Other weights of the averaged and the current section."""
BRANCHES = ("adapters", "prompts", "fused")
VOTED = ("corrected", "released")
DOCS = Path(__file__).parents[1] / "docs" / "ntk_cl_results.md"
Job = tuple[Row, float | None, int, bool]
inherited: dict[str, Any] = {}
"""What a worker was started with: the data and their folder."""


def begin(cached: Cached, folder: Path) -> None:
    """In a worker, before its first run."""
    torch.set_num_threads(1)
    inherited.update(cached=cached, folder=folder)


def work(job: Job) -> tuple[Job, Table]:
    """In a worker: all that the page tells of a run."""
    row, rate, seed, validation = job
    started = process_time()
    stream = stream_of(inherited["cached"], "vit", seed, validation=validation)
    seed_everything(seed)
    method = row.made(inherited["folder"])
    means = Features(method, stream, SETTING.width) if isinstance(method.model.head, Linear) else None
    done = learn(method, stream, row.at(rate), seed=seed, on_event=means or (lambda _: None))
    found: Table = {
        "metrics": all_metrics(done.accuracy_matrix),
        "accuracy_matrix": done.accuracy_matrix,
        "trainable_parameters": done.trainable_parameters,
        "stored_numbers": stored_numbers(method.state_dict()),
        "seconds": sum(done.seconds),
        "cpu_seconds": process_time() - started,
    }
    if means is not None:
        found |= {"means": all_metrics(means.matrix), "means_matrix": means.matrix}
    if isinstance(method.model.head, Sectioned) and not validation:
        found |= {"votes": votes(method, method.model.head, stream)} if row.label in VOTED else {}
    if isinstance(method, NTKCL) and not validation:
        found |= {"interplay": interplay(method.network, stream)}
    return job, found


def votes(method: Method, head: Sectioned, stream: Stream) -> dict[str, float]:
    """Accuracy over all test samples after the last task with other weights of the sections."""
    outputs, inputs = torch.from_numpy(stream.outputs), torch.from_numpy(stream.source.inputs)
    right = dict.fromkeys(VOTES, 0.0)
    total = sum(len(task.test) for task in stream.tasks)
    for task in stream.tasks:
        with torch.no_grad(), evaluating(method.model):
            cosines = head.cosines(method.model.features(inputs[task.test]))
        for name, weights in VOTES.items():
            answers = (cosines @ torch.tensor(weights, dtype=cosines.dtype)).argmax(1)
            right[name] += float((answers == outputs[task.test]).sum()) / total
    return right


def interplay(network: FusedSections, stream: Stream) -> dict[str, dict[str, float]]:
    """Blocks between tasks of the kernel of each branch's current features, after the last task: mean square of their
    entries, and mean overlap."""
    inputs, last = torch.from_numpy(stream.source.inputs), slice(-SETTING.width, None)
    with torch.no_grad(), evaluating(network):
        by_task = [network.three(inputs[task.test]) for task in stream.tasks]
    found = {}
    for place, branch in enumerate(BRANCHES):
        kernels = TaskKernels.of_features([features[place][:, last] for features in by_task], bias=False)
        pairs = list(combinations(range(len(kernels)), 2))
        found[branch] = {
            "energy": fmean(float(kernels.matrix(*pair).square().mean()) for pair in pairs),
            "overlap": fmean(kernels.overlap(*pair) for pair in pairs),
        }
    return found


def identity_of(job: Job, data: str) -> Any:
    """All that decides the numbers of a run, but for the code."""
    row, rate, *_ = job
    tuner = None if row.tuner is None else repr(TUNERS[row.tuner])
    decided = {"method": row.method, "options": row.options, "tuner": tuner, "optimization": asdict(row.at(rate))}
    return json.loads(json.dumps({**decided, "data": data}))


def measure(store: Store, folder: Path, rows: Sequence[Row], workers: int) -> None:
    """The whole table."""
    cached = SETTING.cached(folder).shared()
    data = cached.hash
    packages = ("torch", "transformers", "peft", "numpy")
    store.all |= {"machine": floor(), "seeds": list(SEEDS), "tuning_seed": TUNING_SEED}
    store.all |= {"versions": {name: version(name) for name in packages}, "title": SETTING.title}
    with get_context("spawn").Pool(workers, begin, (cached, folder)) as pool:

        def completed(jobs: Sequence[Job], part: str) -> Table:
            place = store.all.setdefault(part, {})
            return complete(store, place, pool, work, jobs, [identity_of(job, data) for job in jobs])

        tried = [(row, rate, TUNING_SEED, True) for row in rows if row.tuned_with is None for rate in row.rates]
        rates = chosen(completed(tried, "tuning"))
        store.all["rates"] = rates
        for some in ([row for row in rows if row.tuned_with is None], [row for row in rows if row.tuned_with]):
            jobs = [(row, rates.get(row.source), seed, False) for seed in SEEDS for row in some]
            completed(jobs, "runs")


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = arguments_of(__doc__, [row.label for row in ROWS]).parse_args()
    store = Store(RESULTS / "ntk_cl.json")
    if not arguments.page:
        measure(store, arguments.data, [row for row in ROWS if row.label in arguments.settings], arguments.workers)
    DOCS.write_text(page(store.all))
