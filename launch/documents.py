"""Documents parts of which are made: written anew, or compared with what would be made."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedseg.common.files import write_atomic
from fedseg.reporting import ReportingError


@dataclass(frozen=True)
class Marks:
    """Places of a document: ``<!-- from KIND: SPEC -->``, what is made as the spec says, ``<!-- end -->``.

    Attributes:
        kind: of what they are made.
    """

    kind: str

    def at(self, spec: str) -> str:
        """The mark that opens a place."""
        return f"<!-- from {self.kind}: {spec} -->"

    @property
    def _places(self) -> re.Pattern[str]:
        return re.compile(rf"<!-- from {self.kind}: (?P<spec>.*?) -->\n.*?<!-- end -->", re.DOTALL)

    def specs(self, text: str, document: Path) -> list[str]:
        """What stands in the marks of a document.

        Raises:
            ReportingError: a mark has no end.
        """
        found: list[str] = self._places.findall(text)
        if text.count(opening := f"<!-- from {self.kind}:") != len(found):
            raise ReportingError(f"{document}: a mark '{opening} ... -->' lacks its '<!-- end -->'")
        return found

    def rewritten(self, text: str, made: Callable[[str], str]) -> str:
        """The document with every place made anew, of its spec."""
        return self._places.sub(lambda place: f"{self.at(place['spec'])}\n{made(place['spec'])}<!-- end -->", text)


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
