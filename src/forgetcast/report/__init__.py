"""The report of a run: the forecast made before training beside what was measured after it."""
