"""Trains the pocket checkpoint, part by part: `python -m tools.pocket.train.vae`."""
