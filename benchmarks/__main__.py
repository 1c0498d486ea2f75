"""Run every bar, print a table, write `benchmarks/results/<name>.json`."""

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import (
    forty_kills,
    kernel_race,
    linear_against_training,
    linear_many_steps,
    loop_overhead,
    magnitude_simulation,
    projection_speed,
    what_if_speed,
)
from benchmarks.machine import save


def rows(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Every leaf of a result, with its path."""
    if isinstance(value, dict):
        return [row for key, part in value.items() for row in rows(part, f"{path} / {key}" if path else key)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [row for index, part in enumerate(value) for row in rows(part, f"{path} {index}")]
    return [(path, f"{value:.4g}" if isinstance(value, float) else str(value))]


MODULES = (
    linear_many_steps,
    linear_against_training,
    loop_overhead,
    kernel_race,
    what_if_speed,
    projection_speed,
    forty_kills,
    magnitude_simulation,
)
for module in MODULES:
    name = module.__name__.split(".")[-1]
    result = module.run()
    save(name, result)
    table = Table("measurement", "value", title=module.__doc__)
    for row in rows(result.get("summary", result)):
        table.add_row(*row)
    Console().print(table)
