"""The log of a run's metrics: JSON Lines, only ever appended to by whole lines."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from forgetcast.checks import complaint


class MetricsLog:
    """Appends entries to a JSON Lines file; a last line that an interrupted writer left half-written is dropped.

    A context manager, which closes the file.

    Args:
        path: the file, made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one line, and hand it to the operating system.

        Raises:
            ValueError: a NaN or infinity in the entry, which JSON cannot hold; nothing is written then.
        """
        line = json.dumps(entry, allow_nan=False)
        self._file.write(f"{line}\n".encode())
        self._file.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; a half-written last line is left out.

    Raises:
        ValueError: no such file, or a damaged line within it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except (OSError, ValueError) as error:
        raise complaint(
            f"cannot read the metrics {path} ({error})", "one JSON object a line", "Run the recipe again."
        ) from error
