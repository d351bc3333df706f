"""A look at the data before the first run: `python -m fedseg.datamodules.check DIR`."""
