"""What sites told of their cases, read again: from a site's file, or from a sum over sites."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedseg.datamodules.errors import DataError

FEWEST = 5
"""Cases below which a site tells nothing: sums of few cases are the cases."""


class Counted(Protocol):
    """Numbers over cases."""

    def adds_up(self, least: int) -> bool:
        """Whether these can be the numbers of so many cases or more."""


T = TypeVar("T", bound=Counted)


def from_file(path: Path, what: str, made: Callable[[Any], T]) -> T:
    """What a site wrote as JSON.

    Args:
        path: Of its file.
        what: It holds, in a word.
        made: Makes it of the decoded file.

    Raises:
        DataError: The file does not hold it, or it is of too few cases.
    """
    try:
        found = made(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise DataError(f"{path} holds no {what} ({error}); make it with tell={path.name} at the site") from error
    if not found.adds_up(FEWEST):
        raise DataError(f"{path} does not add up to {FEWEST} cases or more; make it anew with tell={path.name}")
    return found


def from_sum(found: T | None, sites: int) -> T:
    """What masked files of so many sites add up to, if it can be that.

    Raises:
        DataError: It cannot, or there is none.
    """
    if found is None or not found.adds_up(FEWEST * sites):
        raise DataError(
            f"what was told does not add up to {FEWEST} cases or more of each of {sites} sites: a file was changed on "
            "its way; begin anew, with new keys"
        )
    return found
