"""The corridors between sites and server: one currency, one contract, one round loop."""

from fedseg import one_copy

one_copy(__name__)
