"""What a run leaves behind: its folder, tables, curves, overlays, progress and W&B."""


class ReportingError(ValueError):
    """A run cannot be written, read or reported as asked; the message names the cure."""
