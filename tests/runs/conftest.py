"""Recipes whose methods are the tests' own, so that no method of the library decides what is tested."""

import pytest

from forgetcast.methods.registry import METHODS
from forgetcast.runs.recipe import build_recipe


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    monkeypatch.setitem(METHODS, "plain", "example_methods:Plain")
    monkeypatch.setitem(METHODS, "closed", "example_methods:Closed")


@pytest.fixture
def tree():
    return {"name": "example", "data": {"source": "digits", "increment": 2}, "method": {"name": "plain"}}


@pytest.fixture
def recipe(tree):
    return build_recipe(tree)
