"""What the reading of the results table rests on beside its rows."""

from dataclasses import replace

import torch

from benchmarks.method_rows import Choice, Row, Setting
from benchmarks.method_runs import Store, Table, identity_of, last_accuracy
from forgetcast.learn.loop import learn
from forgetcast.learn.seeding import seed_everything
from forgetcast.methods.registry import create
from forgetcast.streams.scenarios import class_incremental
from forgetcast.streams.stream import Stream

STRENGTHS = (1.0, 1e2, 1e4, 1e6)


def at_once(store: Store, table: Table, setting: Setting, row: Row, seed: int) -> None:
    """A closed form over the tasks against the same closed form of all their samples together."""
    tasks = class_incremental(setting.source, setting.increment, seed=seed)
    whole = class_incremental(setting.source, len(tasks.class_order), class_order=tasks.class_order, seed=seed)

    def work() -> dict[str, float]:
        ours, theirs = (_test_logits(setting, row, stream) for stream in (tasks, whole))
        same = (ours.argmax(1) == theirs.argmax(1)).double().mean()
        return {"relative_gap": float((ours - theirs).abs().max() / theirs.abs().max()), "same_answers": float(same)}

    store.kept(table["checks"], f"{row.label}: tasks against all at once", identity_of(setting, row, {}, tasks), work)


def strengths(store: Store, table: Table, setting: Setting, row: Row, choice: Choice, stream: Stream) -> None:
    """A penalty at other strengths, on the validation stream."""
    for strength in STRENGTHS:
        strong = replace(row, options={**row.options, "strength": strength})

        def work(row: Row = strong) -> dict[str, float]:
            return {"last_accuracy": last_accuracy(setting, row, choice, stream)}

        identity = identity_of(setting, strong, choice, stream)
        store.kept(table["checks"], f"{row.label}: strength {strength:g}", identity, work)


def longer(store: Store, table: Table, setting: Setting, row: Row, choice: Choice, stream: Stream) -> None:
    """The ceiling with twice the epochs, on the validation stream: whether it has converged."""
    twice = replace(setting, ceiling=replace(setting.ceiling, epochs=2 * setting.ceiling.epochs))
    store.kept(
        table["checks"],
        f"{row.label}: twice the epochs",
        identity_of(twice, row, choice, stream),
        lambda: {"last_accuracy": last_accuracy(twice, row, choice, stream)},
    )


def _test_logits(setting: Setting, row: Row, stream: Stream) -> torch.Tensor:
    seed_everything(stream.seed)
    method = create(row.method, *setting.backbone(), **row.options)
    learn(method, stream, setting.optimization, seed=stream.seed)
    return method.predict(torch.from_numpy(setting.source.inputs[setting.source.test]))
