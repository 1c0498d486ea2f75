"""What all tests share: shapes and types checked at run time, nothing downloaded, no timing of single examples."""

import os

import pytest
from hypothesis import settings
from jaxtyping import config, install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"
settings.register_profile("forgetcast", deadline=None, derandomize=True)
settings.load_profile("forgetcast")
install_import_hook("forgetcast", "typechecked.check")


@pytest.fixture
def unchecked_types():
    """Without run-time type checks, as a user runs the library: what a wrong type meets then."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
