"""The command line answers before anything heavy is imported."""

import subprocess
import sys

from forgetcast.metrics.matrix import all_metrics
from forgetcast.runs.record import provenance, write_record

HEAVY = ("torch", "pandas", "scipy", "sklearn", "transformers", "accelerate")
HEAVIER = (*HEAVY, "numpy", "altair", "rich")


def imported(words: list[str], modules: tuple[str, ...]) -> tuple[str, str]:
    """What the command prints, and which of the modules it has imported."""
    code = (
        "import sys; from forgetcast.cli import main\n"
        f"try: main({words!r})\n"
        "except SystemExit: pass\n"
        f"print([m for m in {modules!r} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *printed, found = run.stdout.splitlines()
    return "\n".join(printed), found


def test_help_imports_nothing_heavy():
    printed, found = imported(["--help"], HEAVIER)
    assert found == "[]"
    assert "demo" in printed
    assert imported(["--version"], HEAVIER)[1] == "[]"


def test_what_only_reads_records_imports_no_torch(tmp_path):
    first, second = (tmp_path / name for name in ("first", "second"))
    for folder in (first, second):
        matrix = [[1.0], [0.5, 0.75]]
        known = {"recipe": {"name": folder.name}, "seed": 0, "state": "finished", "metrics": all_metrics(matrix)}
        write_record(provenance() | known, folder)
    printed, found = imported(["runs", str(tmp_path)], HEAVY)
    assert found == "[]"
    assert first.name in printed
    printed, found = imported(["compare", str(first), str(second)], HEAVY)
    assert found == "[]"
    assert "paired over seeds" in printed


def test_public_names_are_there():
    code = "import forgetcast as fc\nfor name in fc.__all__: getattr(fc, name)\nprint(len(fc.__all__))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) >= 20
