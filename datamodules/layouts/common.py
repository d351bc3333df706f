"""What the named public layouts share: folders that must be there, images and masks that must pair up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from fedseg.datamodules.cases import Case
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.readers import stem_of, suffix_of

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".ppm", ".gif")


def folders(root: Path) -> list[Path]:
    """Visible folders in the root, sorted.

    Raises:
        DataError: The root is no folder.
    """
    if not root.is_dir():
        raise DataError(f"data.root={root} is no folder; set data.root to the folder that holds the data set")
    return [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith((".", "__"))]


def files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Visible files of the given types, sorted; none where the folder does not exist."""
    if not folder.is_dir():
        return []
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and suffix_of(path) in suffixes and not path.name.startswith(".")
    ]


def one_of(parent: Path, names: Sequence[str]) -> Path | None:
    """The folder in the parent that has one of the names; None where there is none."""
    return next((parent / name for name in names if (parent / name).is_dir()), None)


def by_stem(paths: Iterable[Path], site: str, ending: str = "") -> dict[str, Path]:
    """Files by name without type and ending.

    Args:
        paths: Files.
        site: Names the site in an error.
        ending: What a mask's name has after the image's, such as "_manual1"; upper and lower case count as the same.

    Raises:
        DataError: A name without the ending, or two files of one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        stem = stem_of(path)
        if not stem.lower().endswith(ending.lower()):
            raise DataError(
                f"site {site!r}: expected a name that ends in {ending!r}, found {path}; rename or remove it"
            )
        key = stem[: len(stem) - len(ending)]
        if key in found:
            raise DataError(f"site {site!r}: {found[key]} and {path} are both case {key!r}; rename or remove one")
        found[key] = path
    return found


def paired(images: Mapping[str, Path], masks: Mapping[str, Path], site: str) -> list[tuple[str, Path, Path]]:
    """Name, image and mask of every case.

    Raises:
        DataError: An image without mask, or a mask without image.
    """
    for name in sorted(set(images) ^ set(masks)):
        have, lack = ("image", "mask") if name in images else ("mask", "image")
        path = images.get(name) or masks[name]
        raise DataError(f"site {site!r}, case {name!r}: {have} {path} has no {lack}; add the {lack} or remove the file")
    return [(name, image, masks[name]) for name, image in images.items()]


def found_in_sites(root: Path, expected: str, *readers: Callable[[Path], list[Case]]) -> list[Case]:
    """The cases of a root whose folders are sites, each in one of several layouts.

    Args:
        root: The folder of the sites.
        expected: The layouts, for the error.
        readers: What finds a site's cases, one for each layout.

    Raises:
        DataError: The root holds no site, or one in none of the layouts.
    """
    sites = folders(root)
    found = [case for site in sites for read in readers for case in read(site)]
    empty = {site.name for site in sites} - {case.site for case in found}
    if empty or not found:
        culprit = f" (nothing of the kind in {', '.join(sorted(empty))})" if empty else ""
        raise unexpected(root, f"{expected}{culprit}")
    return found


def unexpected(root: Path, expected: str, odd: str = "") -> DataError:
    """The error for a folder that is not laid out as expected.

    Args:
        root: The folder.
        expected: What was looked for.
        odd: Name of the entry that does not fit, told first.
    """
    entries = sorted(
        (path for path in root.iterdir() if not path.name.startswith(".")),
        key=lambda path: (path.name != odd, path.name),
    )
    names = [path.name + "/" * path.is_dir() for path in entries]
    there = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return DataError(f"{root}: expected {expected}; found {there or 'an empty folder'}")
