"""What every package may use: seeds, files, names. It imports none of them, and no large library."""

from fedseg import one_copy

one_copy(__name__)
