"""The demo as a newcomer runs it: forecast beside measurement, a record, a page that a browser shows."""

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from forgetcast.backbones.weights import weights_hash
from forgetcast.cli import main
from forgetcast.metrics.matrix import all_metrics
from forgetcast.runs.record import read_record, write_record


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(main, ["demo", "--output", str(folder)])
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_forecast_is_printed_before_and_equals_the_measurement(demo):
    folder, output = demo
    lines = [
        line.split("(")[0].split() for line in output.splitlines() if line.startswith(("  forecast", "  measured"))
    ]
    assert [line[0] for line in lines] == ["forecast", "measured"] * 8
    for forecast, measured in zip(lines[::2], lines[1::2], strict=True):
        assert forecast[1:] == measured[1:]
    record = read_record(folder)
    for lane in (record, record["protected"]):
        assert len(lane["tasks"]) == 4
        for entry in lane["tasks"]:
            assert entry["calibration"]["one_minus_cosine"] <= 1e-6
            assert entry["calibration"]["accuracy_error"] == pytest.approx(0, abs=0.01)
        measured = lane["accuracy_matrix"]["measured"]
        assert lane["metrics"] == all_metrics(measured)
        assert np.allclose(
            np.array(measured, float), np.array(lane["accuracy_matrix"]["forecast"], float), atol=0.01, equal_nan=True
        )


def test_protection_keeps_what_plain_training_forgets(demo):
    record = read_record(demo[0])
    assert record["metrics"]["first_minus_last"] > 0.9
    assert record["protected"]["metrics"]["first_minus_last"] < 0.15
    assert record["protected"]["metrics"]["learning_accuracy"] > 0.9


def test_record_says_what_its_numbers_are(demo):
    record = read_record(demo[0])
    assert sorted(record["class_order"]) == list(range(10))
    assert {"torch", "python", "forgetcast"} <= record["versions"].keys()
    assert record["recipe"]["training"]["loss"] == "cross_entropy"
    for key in ("split_hash", "weights_hash"):
        assert record[key].startswith("sha256:")
    assert record["source"]["hash"].startswith("sha256:")
    assert set(record["metrics"]) <= set(record["definitions"])


def test_page_shows_the_numbers_of_the_record_in_a_browser(demo, browser):
    record, complaints = read_record(demo[0]), []
    page = browser.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((demo[0] / "report.html").as_uri())
    page.wait_for_selector("body.drawn", timeout=30_000)
    shown = page.eval_on_selector_all("[data-key]", "all => all.map(e => [e.dataset.key, e.dataset.value])")
    charts = page.eval_on_selector_all("figure svg", "all => all.map(e => e.clientWidth * e.clientHeight)")
    page.close()
    assert complaints == []
    assert len(charts) == 10
    assert min(charts) > 10_000
    assert len(shown) > 100
    for key, text in shown:
        value = record
        for part in key.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        assert json.loads(text) == value, key


def test_report_is_written_again_from_the_record(demo):
    (demo[0] / "report.html").unlink()
    result = CliRunner().invoke(main, ["report", str(demo[0])])
    assert result.exit_code == 0, result.output
    assert (demo[0] / "report.html").stat().st_size > 100_000


def test_own_data(tmp_path):
    draw = np.random.default_rng(0)
    y = np.repeat(np.arange(4) + 10, 30)
    x = draw.integers(0, 40, (120, 6, 6)).astype(np.uint8) + (y[:, None, None] * 4).astype(np.uint8)
    np.savez(tmp_path / "mine.npz", x_train=x[::2], y_train=y[::2], x_test=x[1::2], y_test=y[1::2])
    result = CliRunner().invoke(main, ["demo", "--data", str(tmp_path / "mine.npz"), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    record = read_record(tmp_path / "out")
    assert record["name"] == "mine"
    assert sorted(record["class_order"]) == [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, r"holds \['a'\]; expected x and y"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(2, int)}, r"expected inputs \(n, ...\) and labels"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(3)}, "labels of type float64; expected integer labels"),
        ({"x": np.full((4, 2), np.nan), "y": np.array([0, 0, 1, 1])}, "NaN or infinity; expected finite inputs"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(4, int)}, "1 classes.*expected at least two classes"),
        ({"x": np.array([{}]), "y": np.zeros(1, int)}, "expected an .npz file of plain arrays"),
        (None, "expected an .npz file of plain arrays"),
    ],
)
def test_bad_data_is_a_message_not_a_traceback(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    if arrays is not None:
        np.savez(path, **arrays)
    result = CliRunner().invoke(main, ["demo", "--data", str(path), "--output", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")

    assert re.search(message, result.output), result.output
    assert not (tmp_path / "out").exists()


def test_records_are_whole_or_absent(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_record({"x": float("nan")}, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="cannot read the record.*expected a folder with a record.json"):
        read_record(tmp_path)
    (tmp_path / "record.json").write_text('{"schema": "other"}')
    with pytest.raises(ValueError, match="schema 'other'; expected 'forgetcast.record/1'"):
        read_record(tmp_path)


def test_weights_hash_sees_every_bit():

    state = {"a": torch.ones(2, 3), "b": torch.zeros(1)}
    assert weights_hash(state) == weights_hash(dict(reversed(state.items())))
    assert weights_hash(state) != weights_hash({**state, "a": torch.ones(3, 2)})
    assert weights_hash(state) != weights_hash({**state, "b": torch.full((1,), 1e-30)})
