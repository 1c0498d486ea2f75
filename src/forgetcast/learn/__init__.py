"""Training for real: what forecasts are measured against."""
