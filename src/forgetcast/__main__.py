"""`python -m forgetcast`, as launchers of several processes want it: `torchrun ... -m forgetcast run RECIPE`."""

from forgetcast.cli import main

main(prog_name="forgetcast")
