"""Masks of every depth and kind on disk, written without the libraries that read them."""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

GREY, RGB, INDEXED, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of PNG
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def packed(rows: np.ndarray, bits: int) -> np.ndarray:
    """(H, W * C) values as bytes, the highest bit first, the highest byte first."""
    if bits >= 8:
        return np.ascontiguousarray(rows.astype(f">u{bits // 8}")).view(np.uint8)
    one_by_one = (rows[..., None].astype(np.uint8) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(one_by_one.reshape(len(rows), -1), axis=1)


def write_png(
    path: Path,
    values: np.ndarray,
    bits: int = 8,
    colour: int = GREY,
    palette: Sequence[tuple[int, int, int]] = (),
    opacity: Sequence[int] = (),
    interlaced: bool = False,
) -> Path:
    """A PNG of (H, W) or (H, W, C) values."""
    height, width = values.shape[:2]
    planes = [values[top::down, left::right] for top, left, down, right in ADAM7] if interlaced else [values]
    lines = b"".join(
        b"".join(b"\0" + row.tobytes() for row in packed(plane.reshape(len(plane), -1), bits))
        for plane in planes
        if plane.size
    )
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced)))]
    chunks += [(b"PLTE", bytes(part for entry in palette for part in entry))] if palette else []
    chunks += [(b"tRNS", bytes(opacity))] if opacity else []
    chunks += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    told = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + told)
    return path


MINISWHITE, MINISBLACK, TRUE_COLOUR, PALETTE = 0, 1, 2, 3  # photometric interpretations of TIFF


def write_tiff(
    path: Path,
    values: np.ndarray,
    bits: int = 8,
    photometric: int = MINISBLACK,
    palette: Sequence[tuple[int, int, int]] = (),
    alpha: bool = False,
) -> Path:
    """A big-endian TIFF of one strip."""
    height, width = values.shape[:2]
    samples = 1 if values.ndim == 2 else values.shape[2]
    kind = {"u": 1, "b": 1, "i": 2, "f": 3}[values.dtype.kind]
    rows = values.reshape(height, -1)
    strip = rows.astype(rows.dtype.newbyteorder(">")).tobytes() if kind > 1 else packed(rows, bits).tobytes()
    entries: list[tuple[int, str, tuple[int, ...]]] = [
        (256, "I", (width,)),
        (257, "I", (height,)),
        (258, "H", (bits,) * samples),
        (259, "H", (1,)),
        (262, "H", (photometric,)),
        (273, "I", (8,)),
        (277, "H", (samples,)),
        (278, "I", (height,)),
        (279, "I", (len(strip),)),
    ]
    if palette:
        table = [*palette, *[(0, 0, 0)] * (2**bits - len(palette))]
        entries.append((320, "H", tuple(colour[part] * 257 for part in range(3) for colour in table)))
    if alpha:
        entries.append((338, "H", (2,)))
    entries.append((339, "H", (kind,) * samples))
    strip += b"\0" * (len(strip) % 2)
    directory, far = struct.pack(">H", len(entries)), b""
    end = 8 + len(strip) + 2 + 12 * len(entries) + 4
    for tag, code, numbers in entries:
        packed_numbers = struct.pack(f">{len(numbers)}{code}", *numbers)
        place = packed_numbers.ljust(4, b"\0") if len(packed_numbers) <= 4 else struct.pack(">I", end + len(far))
        far += packed_numbers if len(packed_numbers) > 4 else b""
        directory += struct.pack(">HHI", tag, {"H": 3, "I": 4}[code], len(numbers)) + place
    header = b"MM\0*" + struct.pack(">I", 8 + len(strip))
    path.write_bytes(header + strip + directory + b"\0\0\0\0" + far)
    return path


def write_netpbm(path: Path, values: np.ndarray, largest: int, text: bool = False) -> Path:
    """A PGM of (H, W) or a PPM of (H, W, 3) values."""
    colours = values.ndim == 3
    kind = (3 if colours else 2) if text else (6 if colours else 5)
    head = f"P{kind}\n# drawn by hand\n{values.shape[1]} {values.shape[0]}\n{largest}\n".encode()
    if text:
        body = "\n".join(" ".join(map(str, row)) for row in values.reshape(len(values), -1).tolist()).encode()
    else:
        body = values.astype(">u2" if largest > 255 else np.uint8).tobytes()
    path.write_bytes(head + body)
    return path


def write_bmp(path: Path, indices: np.ndarray, bits: int, palette: Sequence[tuple[int, int, int]]) -> Path:
    """A BMP of (H, W) palette indices."""
    height, width = indices.shape
    rows = packed(indices, bits)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4)))[::-1]
    table = b"".join(bytes((blue, green, red, 0)) for red, green, blue in palette)
    start = 54 + len(table)
    head = b"BM" + struct.pack("<IHHI", start + rows.size, 0, 0, start)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, rows.size, 0, 0, len(palette), 0)
    path.write_bytes(head + info + table + rows.tobytes())
    return path
