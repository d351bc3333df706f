"""Names of sites bound to keys: a site signs what it answers, and its name belongs to the first key that was seen.

Flower (1.42) knows the key of every SuperNode, but tells the ServerApp only numbers of nodes. So a site has a key pair
of its own (Ed25519), made at its first message and kept in its folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedseg.common.files import write_atomic

PRIVATE, PUBLIC = "site.key", "site.pub"
KEY = re.compile("[0-9a-f]{64}")


class SiteKey:
    """A site's key pair; the private half never leaves its folder.

    Args:
        folder: the site's own.
        site: its name.
    """

    def __init__(self, folder: Path, site: str) -> None:
        path = folder / PRIVATE
        if not path.exists():
            write_atomic(path, Ed25519PrivateKey.generate().private_bytes_raw().hex(), private=True)
        self._private = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text().strip()))
        self.public = self._private.public_key().public_bytes_raw().hex()
        if not (folder / PUBLIC).exists():
            write_atomic(folder / PUBLIC, f"{site}: {self.public}\n")

    def sign(self, text: str) -> str:
        """A signature of the text."""
        return self._private.sign(text.encode()).hex()


def signed(public: str, text: str, signature: str) -> bool:
    """Whether a signature is of this text, by the owner of this key; a key is written in one way only."""
    if not KEY.fullmatch(public):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature), text.encode())
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass
class Pins:
    """Which key belongs to which name.

    Attributes:
        keys: name -> public key, of all that are known.
        closed: whether they are a list that somebody gave, so that no other name may come.
        seen: names whose key was taken at first sight, since they were last looked at.
    """

    keys: dict[str, str] = field(default_factory=dict)
    closed: bool = False
    seen: list[str] = field(default_factory=list)

    def refusal(self, site: str, key: str) -> str:
        """Why a name cannot belong to a key; empty where it does, or does from now on."""
        known = self.keys.get(site)
        if known == key:
            return ""
        if known is not None:
            return f"its key is {key[:16]}..., but the name {site!r} belongs to the key {known[:16]}..."
        if owner := next((name for name, other in self.keys.items() if other == key), ""):
            return f"its key belongs to the name {owner!r}; every site needs a state folder of its own"
        if self.closed:
            return f"its name is not among those of deployment.keys; if it is to take part, add the line {site}: {key}"
        self.keys[site] = key
        self.seen.append(site)
        return ""
