"""Options are those of the constructor of a method, for every method of the library."""

import pytest

from forgetcast.methods.registry import METHODS, method_class
from forgetcast.runs.options import GIVEN_BY_THE_RUN, check_options, method_options

NAMES = sorted(METHODS)


def test_options_are_what_the_run_does_not_give():
    assert list(method_options(method_class("plain"))) == ["strength", "ranks"]
    assert list(method_options(method_class("closed"))) == ["size", "part"]


def test_what_yaml_cannot_say_is_no_value():
    check_options("closed", {"size": 3})
    with pytest.raises(ValueError, match="got method.part='x'; expected a value of type .*Module.*Correct method.part"):
        check_options("closed", {"size": 3, "part": "x"})


@pytest.mark.parametrize("name", NAMES)
def test_every_method_of_the_library_can_be_said_in_a_recipe(name):
    check_options(name, {})
    defaults = {key: value.default for key, value in method_options(method_class(name)).items()}
    check_options(name, defaults)
    assert not defaults.keys() & set(GIVEN_BY_THE_RUN)


@pytest.mark.parametrize("name", NAMES)
def test_options_of_another_type_are_refused(name):
    for key in method_options(method_class(name)):
        with pytest.raises(ValueError, match=f"got method.{key}=.*; expected a value of type"):
            check_options(name, {key: {"no": ["option"]}})
