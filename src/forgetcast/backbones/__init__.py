"""Frozen pretrained networks as maps from inputs to features, and their features kept on disk."""
