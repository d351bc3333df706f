"""Headers of NRRD and MetaImage as text: what the library that decodes these files overlooks, and where voxels lie."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fedseg.datamodules.errors import DataError
from fedseg.datamodules.readers.kinds import SERIES, in_series, suffix_of

META = (".mha", ".mhd")
DETACHED = (".mhd", ".nhdr")
LONGEST = 2**20  # bytes of a line; a header is text
MOST_FILES = 2**16
MOST_SIDES = 8  # dimensions that are told apart from nonsense
MOST_VOXELS = 2**40
META_NUMBERS = {  # numbers that a field has: dimensions to this power
    **dict.fromkeys(("elementspacing", "elementsize", "offset", "position", "origin", "centerofrotation"), 1),
    **dict.fromkeys(("transformmatrix", "rotation", "orientation"), 2),
}
CHUNK = 2**20
AUTO, GZIP = 47, b"\x1f\x8b"  # zlib's bits for either kind of stream, and how one of gzip begins
AGAIN = "replace the file or leave it out"


@dataclass(frozen=True)
class Header:
    """What the text at the start of a file says.

    Attributes:
        path: The file.
        fields: By name in lower case, as written.
        keys: Free pairs of a NRRD file, as written.
        end: Where the text ends.
        files: Files that hold the voxels; none where they follow the text.
    """

    path: Path
    fields: Mapping[str, str]
    keys: Mapping[str, str]
    end: int
    files: tuple[Path, ...]

    @property
    def meta(self) -> bool:
        """Whether it is MetaImage; else NRRD."""
        return suffix_of(self.path) in META


def read_header(path: Path) -> Header:
    """Reads the text.

    Raises:
        DataError: It is none.
    """
    meta = suffix_of(path) in META
    with path.open("rb") as stream:
        magic = b"" if meta else stream.readline(LONGEST)
        if not meta and not magic.startswith(b"NRRD000"):
            raise DataError(f"is no NRRD file: it does not start with NRRD000; {AGAIN}")
        fields: dict[str, str] = {}
        keys: dict[str, str] = {}
        for line in _lines(stream):
            free = not meta and re.match(r"^([^:]+):=(.*)$", line)
            if free:
                keys[free.group(1)] = free.group(2)
                continue
            name, separator, value = line.partition("=" if meta else ":")
            if not separator:
                raise DataError(f"has no header of its type: it holds the line {line[:40]!r}; {AGAIN}")
            fields[_plain(name)] = value.strip()
            if _plain(name) == "elementdatafile" or (_plain(name) == "datafile" and value.split()[:1] == ["LIST"]):
                break
        if meta and "elementdatafile" not in fields:
            raise DataError(f"is no MetaImage file: no line says ElementDataFile; {AGAIN}")
        end = stream.tell()
        rest = stream.read(LONGEST) if _data(fields).startswith("LIST") else b""
    listed = [line.strip() for line in rest.decode("latin-1").splitlines() if line.strip()]
    return Header(path, fields, keys, end, tuple(path.parent / name for name in _names(_data(fields), listed)))


def _plain(name: str) -> str:
    """A field's name however it is spaced: NRRD says "data file" and "datafile"."""
    return re.sub(r"[\s_]", "", name).lower()


def _lines(stream: BinaryIO) -> Iterator[str]:
    """Lines up to an empty one, without comments."""
    while raw := stream.readline(LONGEST):
        line = raw.decode("latin-1").strip("\r\n")
        if not line.strip():
            return
        if not line.startswith("#"):
            yield line


def _data(fields: Mapping[str, str]) -> str:
    return fields.get("elementdatafile", fields.get("datafile", "LOCAL"))


def _names(told: str, listed: list[str]) -> list[str]:
    """Names of the files that hold the voxels: one, those listed, or those of a pattern with first, last and step."""
    if told.upper() == "LOCAL":
        return []
    if told.startswith("LIST"):
        return listed
    pattern = re.match(r"^([^\s%]*%\d*d[^\s%]*)\s+(-?\d+)\s+(-?\d+)(?:\s+(-?\d+))?", told)
    if not pattern:
        return [told]
    first, last, step = (int(pattern.group(place) or 1) for place in (2, 3, 4))
    numbers = range(first, last + (1 if step > 0 else -1), step or 1)
    if len(numbers) > MOST_FILES:
        raise DataError(f"names {len(numbers)} files for its voxels; {AGAIN}")
    return [pattern.group(1) % number for number in numbers]


def data_files(path: Path) -> tuple[Path, ...]:
    """Files that hold the voxels of a header or a series; none where it holds them itself, or cannot be read."""
    suffix = suffix_of(path)
    if suffix == SERIES:
        return tuple(in_series(path))
    if suffix not in DETACHED:
        return ()
    try:
        return read_header(path).files
    except (DataError, OSError):
        return ()


def check_files(header: Header) -> None:
    """Refuses a header whose voxels are not there."""
    for file in header.files:
        if not file.is_file():
            raise DataError(f"names the file {file.name} for its voxels, which is not there; copy it beside the header")


def check_numbers(header: Header) -> None:
    """Refuses a header whose numbers cannot be, some of which end the process in the library that decodes the file."""
    fields = header.fields
    name, sizes = ("ndims", "dimsize") if header.meta else ("dimension", "sizes")
    sides = fields.get(name, "")
    wanted = {sizes: 1, **(META_NUMBERS if header.meta else {})}
    _expect(sides.isdecimal() and 1 <= int(sides) <= MOST_SIDES, name, sides)
    for field, power in wanted.items():
        words = fields.get(field, "").split()
        if field == sizes or field in fields:
            told = len(words) == int(sides) ** power and all(_is_number(word) for word in words)
            _expect(told, field, fields.get(field, ""))
    grid = fields[sizes].split()
    _expect(all(word.isdecimal() and int(word) > 0 for word in grid), sizes, fields[sizes])
    _expect(math.prod(int(word) for word in grid) < MOST_VOXELS, sizes, fields[sizes])
    for field in ("elementnumberofchannels", "compresseddatasize"):
        _expect(fields.get(field, "1").isdecimal(), field, fields.get(field, ""))
    _expect(not header.meta or list(fields).index(name) < list(fields).index(sizes), name, sides)
    _expect(not header.meta or fields.get("elementtype", "").startswith("MET_"), "elementtype", "")


def _expect(told: bool, field: str, value: str) -> None:
    if not told:
        raise DataError(f"has a header that cannot be right ({field}: {value[:40] or 'nothing'}); {AGAIN}")


def check_text(header: Header, cure: str) -> None:
    """Refuses what a decoder would pass over: no voxel size, other units than millimetres, values to be scaled.

    Args:
        header: Of a volume.
        cure: Where it has no voxel size.
    """
    fields = header.fields
    sizes, unit = _meta_sizes(fields) if header.meta else _nrrd_sizes(fields)
    if sum(0 < size < math.inf for size in sizes) < 3:
        told = ", ".join(f"{size:.3g}" for size in sizes) or "nothing"
        raise DataError(f"has no voxel size along an axis (its header says {told}); {cure}")
    if unit.lower() not in ("", "mm", "?"):
        raise DataError(f"is measured in {unit} by its header; write it anew in mm")
    slope = (fields.get("elementtointensityfunctionslope", "1"), fields.get("elementtointensityfunctionoffset", "0"))
    if [_number(word) for word in slope] != [1, 0]:
        raise DataError(f"wants its values scaled (slope and offset {', '.join(slope)}); store them as they are meant")


def _meta_sizes(fields: Mapping[str, str]) -> tuple[list[float], str]:
    """Sizes of voxels and their unit."""
    return [_number(word) for word in fields.get("elementspacing", "").split()[:3]], fields.get("distanceunits", "mm")


def _nrrd_sizes(fields: Mapping[str, str]) -> tuple[list[float], str]:
    """Sizes of voxels, of all axes that have one, and their unit."""
    vectors = re.findall(r"\(([^)]*)\)", fields.get("spacedirections", ""))
    sizes = [math.sqrt(sum(_number(word) ** 2 for word in vector.split(","))) for vector in vectors]
    units = {*re.findall(r'"([^"]*)"', fields.get("spaceunits", ""))} - {"", "mm"}
    return sizes or [_number(word) for word in fields.get("spacings", "").split()], " ".join(sorted(units))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def check_bytes(header: Header, expected: int) -> None:
    """Refuses files that hold fewer bytes than the header says, or more: sizes are then wrong, and rows out of place.

    Args:
        header: Of a file.
        expected: Bytes of all voxels.
    """
    packed = int(header.fields.get("compresseddatasize", "0"))
    there = sum(file.stat().st_size for file in header.files or (header.path,))
    if packed > there:
        raise DataError(f"is cut short: {there} of {packed} compressed bytes are there; {AGAIN}")
    held = _held(header)
    if held is None or held == expected:
        return
    where = f" in {header.files[0].name}" if header.files else ""
    if held < expected:
        raise DataError(f"is cut short: {held} of {expected} bytes are there{where}; {AGAIN}")
    cure = "correct its sizes, or export it again"
    raise DataError(f"has other sizes than its voxels: {expected} bytes by its header, {held}{where}; {cure}")


def _held(header: Header) -> int | None:
    """Bytes of the voxels as stored, after inflating; None where that is not told."""
    fields = header.fields
    if header.meta:
        packed, plain = fields.get("compresseddata", "false").lower()[:1] in ("t", "1"), True
        skipped = fields.get("headersize", "0")
        if fields.get("binarydata", "true").lower()[:1] in ("f", "0"):
            return None
    else:
        encoding = fields.get("encoding", "").lower()
        packed, plain = encoding in ("gzip", "gz"), encoding in ("raw", "gzip", "gz")
        skipped = fields.get("byteskip", "0")
        if _number(fields.get("lineskip", "0")) != 0:
            return None
    skip = _number(skipped)
    if not plain or not skip >= 0 or (packed and skip):
        return None
    total = 0
    for file in header.files or (header.path,):
        start = int(skip) if header.files else header.end + int(skip)
        total += _inflated(file, start) if packed else max(file.stat().st_size - start, 0)
    return total


def _inflated(file: Path, start: int) -> int:
    """Bytes that a zlib stream or the parts of a gzip stream hold, as far as they go."""
    total, unpack = 0, zlib.decompressobj(wbits=AUTO)
    with file.open("rb") as stream:
        stream.seek(start)
        try:
            while chunk := stream.read(CHUNK):
                while chunk:
                    total += len(unpack.decompress(chunk, CHUNK))
                    chunk = unpack.unconsumed_tail
                    if unpack.eof and unpack.unused_data.startswith(GZIP):
                        chunk, unpack = unpack.unused_data, zlib.decompressobj(wbits=AUTO)
            return total + len(unpack.flush())
        except zlib.error:
            return total
