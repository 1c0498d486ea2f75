"""`forgetcast run`, `compare --joint` and `report` on real runs, as a person types them."""

import json

import pytest
from accelerate.state import AcceleratorState
from click.testing import CliRunner

from forgetcast.cli import main
from forgetcast.metrics.transfer import intransigence
from forgetcast.runs.metrics_log import read_metrics
from forgetcast.runs.record import read_record


def type_in(*words):
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name in ("sequential", "joint", "lwf"):
        (root / f"{name}.yaml").write_text(
            f"data: {{source: digits, increment: 5}}\nmodel: {{backbone: mlp:8}}\nmethod: {{name: {name}}}\n"
            "training: {epochs: 2, learning_rate: 0.01, batch_size: 16, evaluate_every: 60}\n"
        )
        done = type_in("run", root / f"{name}.yaml", "--root", root)
        assert done.exit_code == 0, done.output
        (root / f"{name}.told").write_text(done.stderr)
    return root


def folder(root, name):
    (found,) = root.glob(f"{name}-seed0-*")
    return found


def test_the_record_holds_every_number_of_every_task(root):
    record = read_record(folder(root, "sequential"))
    for key in (
        "accuracy_matrix",
        "per_class_accuracy",
        "calibration_error",
        "seconds_training",
        "seconds_evaluation",
        "trainable_parameters",
        "stored_numbers",
        "accuracy_on_next_task",
    ):
        assert len(record[key]) == 2, key
        assert key in record["definitions"]
    assert len(record["peak_memory"]["bytes"]) == 2
    assert record["peak_memory"]["definition"] in record["definitions"]
    assert record["trains_on_all_tasks"] is False
    assert read_record(folder(root, "joint"))["trains_on_all_tasks"] is True
    assert {"expected_calibration_error", "average_anytime_accuracy"} <= set(record["metrics"])
    assert set(record["metrics"]) <= set(record["definitions"])
    assert sorted(record["classes"]) == [str(digit) for digit in range(10)]
    assert len(record["per_class_drop"]) == 10
    assert sum(drop is not None for drop in record["per_class_drop"]) == 5


@pytest.mark.parametrize("name", ["sequential", "lwf"])
def test_what_each_task_trains_and_stores_is_told(root, name):
    record = read_record(folder(root, name))
    (first, second), (trained, more) = record["stored_numbers"], record["trainable_parameters"]
    assert second - first >= more - trained == 5 * 9  # rows of five classes
    told = [line for line in (root / f"{name}.told").read_text().splitlines() if line.startswith("task ")]
    assert [line.split(", ", 1)[1] for line in told] == [
        f"{trained:,} numbers trained, {first:,} stored",
        f"{more:,} numbers trained, {second:,} stored (+{second - first:,})",
    ]
    compared = type_in("compare", folder(root, name), folder(root, "joint")).output
    row = next(line for line in compared.splitlines() if line.split()[:2] == [name, "1"])
    assert row.split()[-2:] == [f"{second:,}", f"+{second - first:,}"]


def test_the_log_holds_steps_epochs_evaluations_and_tasks(root):
    events = read_metrics(folder(root, "sequential") / "metrics.jsonl")
    kinds = {kind: [event for event in events if event["event"] == kind] for kind in ("step", "evaluation", "task")}
    assert [event["run_step"] for event in kinds["step"] if event["task"] == 0] == [50]
    assert [event["run_step"] for event in kinds["evaluation"] if event["task"] == 0] == [60]
    record = read_record(folder(root, "sequential"))
    assert [event["accuracy"] for event in kinds["task"]] == record["accuracy_matrix"]
    assert len(record["evaluations"]) == len(kinds["evaluation"]) + 2


def test_intransigence_against_joint_training(root):
    runs = [folder(root, name) for name in ("sequential", "lwf")]
    done = type_in("compare", *runs, "--joint", folder(root, "joint"), "--metric", "intransigence")
    assert done.exit_code == 0, done.output
    best = read_record(folder(root, "joint"))["accuracy_matrix"]
    for run in runs:
        own = intransigence(read_record(run)["accuracy_matrix"], [row[-1] for row in best])
        assert f"{own:.4f}" in done.output
    assert "lower is better" in done.output
    assert "what protecting cost in learning" in done.output
    without = type_in("compare", *runs, "--metric", "intransigence")
    assert without.exit_code == 1
    assert "expected one joint run" in without.output


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps one precision for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_precision_is_part_of_what_a_run_is(root, fresh_accelerator):
    words = ["run", root / "sequential.yaml", "--root", root / "half", "training.precision=bfloat16"]
    done = type_in(*words)
    assert done.exit_code == 0, done.output
    half, full = read_record(folder(root / "half", "sequential")), read_record(folder(root, "sequential"))
    assert half["recipe_hash"] != full["recipe_hash"]
    assert half["weights_hash"]["backbone_at_start"] == full["weights_hash"]["backbone_at_start"]
    assert half["weights_hash"]["model_at_end"] != full["weights_hash"]["model_at_end"]
    assert half["metrics"]["learning_accuracy"] == pytest.approx(full["metrics"]["learning_accuracy"], abs=0.05)


def test_the_page_is_written_by_the_run_and_again_by_the_report(root, tmp_path):
    run = folder(root, "sequential")
    first = (run / "report.html").read_text()
    assert json.dumps(read_record(run)["split_hash"]) in first
    (run / "report.html").unlink()
    done = type_in("report", run)
    assert done.output.strip() == f"report: {run / 'report.html'}"
    assert (run / "report.html").read_text() == first
