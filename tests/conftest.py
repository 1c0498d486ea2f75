"""What all tests share: shapes and types checked at run time, nothing downloaded, no timing of single examples."""

import os
import shutil

import pytest
from hypothesis import settings
from jaxtyping import config

from typechecked import install

os.environ["HF_HUB_OFFLINE"] = "1"
settings.register_profile("forgetcast", deadline=None, derandomize=True)
settings.load_profile("forgetcast")
install()


@pytest.fixture
def unchecked_types():
    """Without run-time type checks, as a user runs the library: what a wrong type meets then."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def browser():
    """One Chromium for all tests of a process: Playwright can be started only once in it."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine: install Debian's chromium to look at the pages")
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=arguments)
        yield launched
        launched.close()
