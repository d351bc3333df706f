"""Random numbers are derived, never carried: a resumed run then equals an uninterrupted one.

Two formulas for two domains, each kept as it is, so that runs of earlier versions can be repeated.
"""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 32-bit seed that depends on every part and on their order; of what is learnt, sent and hidden."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def data_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) from anything that names a random stream of data: splits, batches, augmentation."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
