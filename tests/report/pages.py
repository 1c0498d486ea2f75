"""Pages in a browser, and what to try to break them with."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</script><b id='injected'>cat & dog</b><script>document.title = 'injected'</script>"

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")


def open_page(browser: Browser, path: Path, width: int = 1280, drawn: str = "body.drawn") -> tuple[Page, list[str]]:
    """The page once `drawn` is there, and a list of all that went wrong or left the machine."""
    page, complaints = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: None if is_local(request.url) else complaints.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector(drawn, timeout=15_000)
    return page, complaints


def is_local(url: str) -> bool:
    return url.startswith(("file:", "data:"))


def at(record: Any, key: str) -> Any:
    for step in key.split("."):
        record = record[int(step)] if isinstance(record, list) else record[step]
    return record
