"""Makes and measures the pocket checkpoint (see pocket/README.md). From the root: `python -m tools.pocket.measure`."""
