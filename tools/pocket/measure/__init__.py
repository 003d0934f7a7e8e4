"""Measures the pocket checkpoint: `python -m tools.pocket.measure`."""
