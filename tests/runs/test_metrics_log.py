"""The metrics log holds whole lines, whenever its writer was stopped."""

import pytest

from forgetcast.runs.metrics_log import MetricsLog, read_metrics

ENTRIES = [{"step": 0, "loss": 1.5}, {"step": 1, "loss": 0.25}, {"task": "é", "values": [1, None]}]


def write(path, entries):
    with MetricsLog(path) as log:
        for entry in entries:
            log.append(entry)


def test_entries_are_there_at_once_and_after_reopening(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        for count, entry in enumerate(ENTRIES):
            log.append(entry)
            assert read_metrics(path) == ENTRIES[: count + 1]
    write(path, ENTRIES)
    assert read_metrics(path) == ENTRIES * 2


def test_a_writer_stopped_at_any_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, ENTRIES)
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        kept = whole[:length].count(b"\n")
        write(path, [{"again": 1}])
        assert read_metrics(path) == [*ENTRIES[:kept], {"again": 1}]


def test_reading_leaves_out_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1')
    assert read_metrics(path) == [{"step": 0}]


def test_what_json_cannot_hold_is_refused_and_not_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"loss": 1.0})
        with pytest.raises(ValueError, match="not JSON compliant"):
            log.append({"loss": float("nan")})
    assert read_metrics(path) == [{"loss": 1.0}]


def test_damage_within_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step"\n{"step": 1}\n')
    with pytest.raises(ValueError, match="cannot read the metrics .*; expected one JSON object a line"):
        read_metrics(path)
    with pytest.raises(ValueError, match="cannot read the metrics"):
        read_metrics(tmp_path / "nowhere.jsonl")
