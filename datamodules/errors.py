"""What goes wrong with data, told with the site, the file and the cure."""

from __future__ import annotations


class DataError(ValueError):
    """Input data or a data setting that cannot be used; the message names the culprit and the cure."""
