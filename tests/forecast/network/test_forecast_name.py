"""`fc.forecast` is the function and `forgetcast.forecast` the package, whichever is met first."""

import subprocess
import sys

import pytest

import forgetcast as fc
from forgetcast.forecast import filters
from forgetcast.forecast.network import entry
from forgetcast.protect import restraint

LIGHT = "import sys, forgetcast as fc; assert not {'torch', 'numpy', 'pandas'} & set(sys.modules)"
FUNCTION_FIRST = f"""
{LIGHT}
function = fc.forecast
from forgetcast.forecast.linear import forecast_linear
from forgetcast.forecast import filters
import forgetcast.forecast.order
from forgetcast import forecast
assert fc.forecast is forecast is function and callable(function) and fc.forecast_linear is forecast_linear
"""
PACKAGE_FIRST = """
import importlib, sys
import forgetcast.forecast
from forgetcast.forecast.training import SGD
from forgetcast.forecast.network.entry import forecast
import forgetcast as fc
assert fc.forecast is forecast and fc.SGD is SGD
from forgetcast.protect.restraint import protect
assert fc.protect is protect
assert importlib.reload(sys.modules["forgetcast.forecast"]).__path__
assert fc.forecast is forecast
"""


@pytest.mark.parametrize("code", [FUNCTION_FIRST, PACKAGE_FIRST])
def test_neither_hides_the_other(code):
    subprocess.run([sys.executable, "-c", code], check=True)


def test_here():
    assert fc.forecast is entry.forecast
    assert fc.protect is restraint.protect
    assert filters.__name__ == "forgetcast.forecast.filters"
    assert {"forecast", "NetworkForecast", "Frontier", "Trust", "place_rows"} <= set(fc.__all__)
