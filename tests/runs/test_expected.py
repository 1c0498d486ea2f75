"""Expected values: judged in the record, told on the command line, and no part of what decides a run's numbers."""

import pytest
from click.testing import CliRunner

from forgetcast.cli import main
from forgetcast.runs.compare import compare
from forgetcast.runs.execute import execute
from forgetcast.runs.expected import NAMES, Expectation, judged, told
from forgetcast.runs.keys import to_yaml
from forgetcast.runs.listing import list_runs
from forgetcast.runs.recipe import build_recipe
from forgetcast.runs.record import read_record


def expectation(metric="last_accuracy", value=0.5, tolerance=0.1):
    return Expectation(metric=metric, value=value, tolerance=tolerance, source="by hand")


@pytest.mark.parametrize(
    ("measured", "holds"), [(0.5, True), (0.6, True), (0.4, True), (0.4 - 1e-6, False), (0.61, False), (None, False)]
)
def test_holds_within_the_tolerance(measured, holds):
    metrics = {} if measured is None else {"last_accuracy": measured}
    (judgement,) = judged([expectation()], metrics)
    assert judgement["measured"] == measured
    assert judgement["holds"] is holds
    assert ("DOES NOT HOLD" in told(judgement)) is not holds


@pytest.fixture
def cheap(tree):
    return tree | {"method": {"name": "ncm"}, "data": {"source": "digits", "increment": 5}}


def expecting(value):
    return [{"metric": "last_accuracy", "value": value, "tolerance": 0.1, "source": "by hand"}]


def test_expected_values_are_no_part_of_the_hash(cheap):
    hashes = {build_recipe(cheap | {"expected": expecting(value)}).hash for value in (0.1, 0.2)}
    assert hashes == {build_recipe(cheap).hash}


def test_the_command_tells_and_exits_with_its_own_code(cheap, tmp_path):
    def typed(value, *more):
        (tmp_path / "example.yaml").write_text(to_yaml(cheap | {"expected": expecting(value)}))
        return CliRunner().invoke(main, ["run", str(tmp_path / "example.yaml"), "--root", str(tmp_path), *more])

    good = typed(0.9)
    assert good.exit_code == 0
    assert "expected 0.9 ± 0.1 (by hand): holds" in good.output
    bad = typed(0.3, "--seeds", "0,1")
    assert bad.exit_code == 3
    assert bad.output.count("expected 0.3 ± 0.1 (by hand): DOES NOT HOLD") == 2
    # in the first run's own directory: what is expected of it has changed, its numbers have not
    assert [run.record["expected"][0]["holds"] for run in list_runs(tmp_path)] == [False, False]


def test_recipes_compare_as_one_whatever_they_expect(cheap, tmp_path):
    records = []
    for seed, value in ((0, 0.1), (1, 0.2)):
        for increment in (5, 2):
            data = {"source": "digits", "increment": increment}
            given = cheap | {"seed": seed, "data": data, "expected": expecting(value)}
            records.append(read_record(execute(build_recipe(given), tmp_path)))
    assert [spread.seeds for spread in compare(records, "last_accuracy").spreads] == [(0, 1), (0, 1)]


def test_every_number_of_a_run_can_be_expected(tree, tmp_path):
    data = {"source": ["digits", "digits"], "scenario": "domain_incremental"}
    training = {"evaluate_every": 10}
    given = tree | {"data": data, "training": training, "method": {"name": "sequential"}}
    record = read_record(execute(build_recipe(given), tmp_path))
    assert set(record["metrics"]) == set(NAMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "last_acuracy"}, "got expected.metric='last_acuracy'; .*Did you mean 'last_accuracy'"),
        ({"tolerance": -0.1}, "got expected.0.tolerance=-0.1; expected greater than or equal to 0"),
        ({"source": ""}, "got expected.0.source=''"),
        ({"tolerence": 0.1}, "nothing reads the key expected.0.tolerence; .*Did you mean 'expected.tolerance'"),
    ],
)
def test_refused_expectations(cheap, changes, message):
    with pytest.raises(ValueError, match=message):
        build_recipe(cheap | {"expected": [expecting(0.5)[0] | changes]})
