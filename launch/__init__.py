"""From a config to a run: the only package that knows all others."""

from fedseg import one_copy

one_copy(__name__)
