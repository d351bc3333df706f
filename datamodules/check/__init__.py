"""A look at the data before the first run: `python -m datamodules.check DIR`."""
