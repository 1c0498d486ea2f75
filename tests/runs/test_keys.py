"""YAML says what it seems to say, once; dotted keys name leaves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetcast.runs.keys import did_you_mean, flatten, parse_assignment, parse_yaml, to_yaml

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(st.dictionaries(st.text(), LEAVES | st.lists(LEAVES) | st.dictionaries(st.text(), LEAVES)))
def test_what_is_written_is_read_back(tree):
    back = parse_yaml(to_yaml(tree), "text")
    assert back == tree
    assert repr(back) == repr(tree)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.e-3", "0.001"])
def test_exponents_are_numbers(text):
    assert parse_yaml(text, "text") == 0.001
    assert parse_yaml(to_yaml({"source": text}), "text") == {"source": text}


@pytest.mark.parametrize("text", ["a: 1\na: 2", "s:\n  a: 1\n  a: 1", "{a: 1, a: 1}", "[{a: 1, a: 1}]"])
def test_a_key_twice_is_refused(text):
    with pytest.raises(ValueError, match="'a' twice.*line.*; expected YAML.*each key once"):
        parse_yaml(text, "text")


@pytest.mark.parametrize("text", ["a: .nan", "a: .inf", "a: 2020-01-01", "a: !!python/name:os.system", "a: [", "? [a]"])
def test_what_is_no_plain_value_is_refused(text):
    with pytest.raises(ValueError, match="cannot read this text .*; expected YAML"):
        parse_yaml(text, "this text")


def test_assignments():
    assert parse_assignment("data.class_order=[3, 1]") == ("data.class_order", [3, 1])
    assert parse_assignment("data.base=null") == ("data.base", None)
    assert parse_assignment("data.source=a=b") == ("data.source", "a=b")


@pytest.mark.parametrize("text", ["epochs", "=3", "a..b=3", ".a=1"])
def test_what_is_no_assignment_is_refused(text):
    with pytest.raises(ValueError, match="expected key=value"):
        parse_assignment(text)


def test_leaves_by_dotted_keys():
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


def test_nearest_key():
    known = ["name", "method.name", "training.epochs", "training.batch_size"]
    assert did_you_mean("training.epoch", known) == "Did you mean 'training.epochs'?"
    assert did_you_mean("data.batch_size", known) == "Did you mean 'training.batch_size'?"
    assert did_you_mean("method.nmae", known) == "Did you mean 'method.name'?"
    assert did_you_mean("nmae", known) == "Did you mean 'name'?"
    assert did_you_mean("zzz", known) == "Choose one of them."
    assert did_you_mean("zzz", []) == "Leave it out."
