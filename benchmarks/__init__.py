"""Speed and memory bars. `python -m benchmarks` runs them all; every time stands beside a floor and an accuracy."""
