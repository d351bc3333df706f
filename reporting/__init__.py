"""What a run leaves behind: its folder, tables, curves, overlays, progress and W&B."""

from fedseg import one_copy


class ReportingError(ValueError):
    """A run cannot be written, read or reported as asked; the message names the cure."""


one_copy(__name__)
