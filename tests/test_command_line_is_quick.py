"""The command line answers before anything heavy is imported."""

import subprocess
import sys


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from forgetcast.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'pandas', 'altair', 'rich') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    assert "demo" in run.stdout


def test_public_names_are_there():
    code = "import forgetcast as fc\nfor name in fc.__all__: getattr(fc, name)\nprint(len(fc.__all__))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) >= 20
