"""Names of sites bound to keys: a site signs what it answers, and its name belongs to the first key that was seen.

Flower (1.42) knows the key of every SuperNode, but tells the ServerApp only numbers of nodes. So a site has a key pair
of its own (Ed25519), made at its first message and kept in its folder.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedseg.common.files import write_atomic, write_once
from fedseg.federation.checkpoint import CheckpointError

PRIVATE, PUBLIC = "site.key", "site.pub"
KEY = re.compile("[0-9a-f]{64}")


def own_key(path: Path, lost: str) -> bytes:
    """32 secret bytes of a site, drawn when they are first asked for; of two starts at once both have the same.

    Args:
        path: where they lie.
        lost: what it means when they are others.

    Raises:
        CheckpointError: the file holds something else, which everybody may know, as nothing at all.
    """
    if not path.exists():
        write_once(path, secrets.token_hex(32))
    text = path.read_bytes().decode(errors="replace").strip()
    if not KEY.fullmatch(text):
        raise CheckpointError(
            f"{path} holds no key of 64 hexadecimal digits; bring it back from a copy, or delete it, which makes "
            f"another: {lost}"
        )
    return bytes.fromhex(text)


class SiteKey:
    """A site's key pair; the private half never leaves its folder.

    Args:
        folder: the site's own.
        site: its name.

    Raises:
        CheckpointError: the file of the private half holds none.
    """

    def __init__(self, folder: Path, site: str) -> None:
        lost = f"the server then knows {site!r} by another key, and lets it in once its line in keys.yaml is changed"
        self._private = Ed25519PrivateKey.from_private_bytes(own_key(folder / PRIVATE, lost))
        self.public = self._private.public_key().public_bytes_raw().hex()
        told = folder / PUBLIC
        if not told.exists() or self.public not in told.read_text(encoding="utf-8", errors="replace"):
            write_atomic(told, f"{site}: {self.public}\n")

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
