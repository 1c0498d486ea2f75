"""What the new data will do to the old answers, before the first gradient step."""
