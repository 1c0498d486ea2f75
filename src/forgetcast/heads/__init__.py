"""Heads that turn features into logits, and grow by class."""
