"""Scripts that train the parts of the pocket checkpoint, such as `python -m tools.pocket.train.vae`."""
