"""From a config to a run: the only package that knows all others."""
