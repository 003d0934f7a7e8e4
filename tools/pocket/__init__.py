"""Trains and measures the pocket checkpoint (see pocket/README.md). Run `python -m tools.pocket.measure` in the root
of the repository."""
