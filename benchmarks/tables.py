"""What the commands of the larger tables have in common."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path


def arguments_of(description: str | None, settings: Sequence[str]) -> ArgumentParser:
    """Where the data are, which settings, with how many processes, or the page alone."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the shared data sets")
    parser.add_argument("--settings", nargs="+", choices=list(settings), default=list(settings))
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page from what is there")
    return parser
