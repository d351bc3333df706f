"""Random numbers are derived, never carried: a resumed run then equals an uninterrupted one."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 32-bit seed that depends on every part and on their order."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "little")
