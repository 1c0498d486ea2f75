"""Forecasts for networks: what fine-tuning adapters and a head on new data will do to the old answers."""
