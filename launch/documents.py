"""Documents parts of which are made: written anew, or compared with what would be made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedseg.common.files import write_atomic
from fedseg.reporting import ReportingError


def make_anew(document: Path, make: Callable[[str, Path], str], check: bool, *, told: str, command: str) -> None:
    """Write a document anew, or see that there is nothing to write, and say which.

    Args:
        document: a Markdown file.
        make: what makes its new text of the old one.
        check: write nothing.
        told: whose word it follows, such as "its runs say".
        command: the module that makes it.

    Raises:
        ReportingError: it is to be checked, and would be another one.
    """
    text = document.read_text(encoding="utf-8")
    made = make(text, document)
    if made != text and check:
        raise ReportingError(f"{document} is not what {told}; make it anew: python -m {command} {document}")
    if made != text:
        write_atomic(document, made)
    print(f"{document}: {f'as {told}' if made == text else 'made anew'}")
