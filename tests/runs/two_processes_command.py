"""The command as its users type it, in a process that may not write into the runs unless it is the main one."""

import os
import sys
from pathlib import Path

from forgetcast.cli import main


def refuse_to_write(event: str, arguments: tuple) -> None:
    """An audit hook: Python calls it before it opens, renames or removes a file."""
    writes = event in ("os.rename", "os.remove") or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
    if writes and isinstance(arguments[0], str | os.PathLike) and RUNS in Path(arguments[0]).absolute().parents:
        raise PermissionError(f"a process that is not the main one: {event} of {arguments[0]}")


if __name__ == "__main__":
    RUNS = Path(sys.argv[sys.argv.index("--root") + 1]).absolute()
    if os.environ["RANK"] != "0":
        sys.addaudithook(refuse_to_write)
    main(prog_name="forgetcast")
