"""Sums by masks that cancel, between people who exchange files: no server, and none of its messages.

Every site makes a pair of keys, sends the public one to all others, and masks its whole numbers once with the streams
that it shares with each of them (those of `privacy.masks`, after Bonawitz et al., CCS 2017, without shares of secrets).
Whoever gets the masked numbers of all sites learns their sum; where one site's are missing, every other one's stay
noise, and all begin anew with other keys.

Of a site nobody learns more than the sum says, unless all others act together, or somebody exchanges public keys on the
way: against that, people compare `number` of the keys that they hold.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

from fedseg.common.files import write_atomic
from fedseg.common.text import nameless, quoted
from fedseg.privacy.masks import Words, stream

PUBLIC = ".pub"
CURVE = ec.SECP384R1  # of the keys that Flower makes
LEAST = 3
"""Sites; of a sum of two either one knows the other's part."""


@dataclass(frozen=True)
class Told:
    """What a site made of its numbers.

    Attributes:
        site: Its name.
        sites: Names of all whose keys it used, sorted.
        number: Of those keys.
        words: Its numbers, masked.
    """

    site: str
    sites: tuple[str, ...]
    number: str
    words: Words


def make_key(path: Path, site: str) -> Path:
    """Makes a site's pair of keys: the secret one in a file that its owner alone may read, the public one beside it.

    Returns:
        The file of the public key, for all other sites.

    Raises:
        ValueError: There is a key of that name; it may be in use. Or the site cannot be called so.
    """
    if reason := nameless(site):
        raise ValueError(f"site={quoted(site)} is no name: {reason}")
    public = path.with_name(path.name + PUBLIC)
    for file in (path, public):
        if file.exists():
            raise ValueError(f"{file} is there already; remove it if no round waits for it, or name another key=")
    private, own = generate_key_pairs()
    write_atomic(path, private_key_to_bytes(private), private=True)
    write_atomic(public, json.dumps({"site": site, "key": _text(public_key_to_bytes(own))}))
    return public


def read_keys(files: Iterable[Path]) -> dict[str, bytes]:
    """Public keys by site, each in the one form that the library writes.

    Raises:
        ValueError: A file without a key of this kind, a site or a key twice, no name, or fewer than three sites.
    """
    found: dict[str, bytes] = {}
    for file in files:
        told = _json(file)
        try:
            site = str(told["site"])
            public: Any = bytes_to_public_key(base64.b64decode(told["key"], validate=True))
        except Exception as error:  # whatever the library makes of foreign bytes
            raise ValueError(f"{file} holds no public key; have it made anew with key=") from error
        if reason := nameless(site):
            raise ValueError(
                f"{file} is of a site {quoted(site)}, which is no name: {reason}; have it made anew with site= and key="
            )
        if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, CURVE):
            raise ValueError(
                f"{file} holds a public key that others cannot share a mask with: they are on the curve {CURVE.name}; "
                "have it made anew with key="
            )
        key = public_key_to_bytes(public)
        if site in found or key in found.values():
            raise ValueError(f"{file} has a site or a key that another file has; give one file for each site")
        found[site] = key
    if len(found) < LEAST:
        raise ValueError(f"masked= names {len(found)} sites: {LEAST} or more, of two either knows the other's part")
    return found


def number(keys: Mapping[str, bytes]) -> str:
    """Of a set of keys, for people to compare: sites that read out the same one hold the same keys."""
    digest = _digest(keys).hex()[:32]
    return " ".join(digest[start : start + 4] for start in range(0, len(digest), 4))


def mask(words: Words, site: str, key: Path, keys: Mapping[str, bytes], told: Path) -> None:
    """Writes a site's numbers, masked, and removes its secret key: two rows under one mask would show their difference.

    Args:
        words: Modulo 2^64.
        site: Its name.
        key: The file of its secret key.
        keys: Public ones of all sites, its own included.
        told: The file to write.

    Raises:
        ValueError: See `secret_key`.
    """
    private = secret_key(site, key, keys)
    masked = words
    for peer in sorted(keys.keys() - {site}):
        shared = base64.urlsafe_b64decode(generate_shared_key(private, bytes_to_public_key(keys[peer])))
        pad = stream(hashlib.sha256(_digest(keys) + shared).digest(), len(words))
        masked = masked + pad if site < peer else masked - pad
    content = {"site": site, "sites": sorted(keys), "number": number(keys), "masked": _text(masked.tobytes())}
    write_atomic(told, json.dumps(content))
    key.unlink()


def secret_key(site: str, key: Path, keys: Mapping[str, bytes]) -> Any:
    """A site's secret key.

    Raises:
        ValueError: There is none, or it does not belong to the site's public one.
    """
    if not key.is_file():
        raise ValueError(f"{key} is not there: a key serves once; make another with key= and send {key.name}{PUBLIC}")
    try:
        private: Any = bytes_to_private_key(key.read_bytes())
        own = public_key_to_bytes(private.public_key())
    except Exception as error:  # whatever the library makes of foreign bytes
        raise ValueError(f"{key} holds no secret key; make another with key=") from error
    if keys.get(site) != own:
        raise ValueError(f"masked= has not the public key of {site} that belongs to {key}; add {key}{PUBLIC}")
    return private


def read_told(file: Path) -> Told:
    """What `mask` wrote.

    Raises:
        ValueError: The file does not hold it.
    """
    told = _json(file)
    try:
        words = np.frombuffer(base64.b64decode(told["masked"], validate=True), np.uint64)
        found = Told(str(told["site"]), tuple(map(str, told["sites"])), str(told["number"]), words)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no masked numbers; have it made anew") from error
    if any(map(nameless, (found.site, *found.sites))) or not found.number.isprintable():
        raise ValueError(f"{file} names sites or keys in a way that no site does; have it made anew")
    return found


def total(files: Iterable[Path]) -> tuple[Words, Told]:
    """The sum of what all sites told, and the last of them.

    Raises:
        ValueError: A site's file is missing or twice, or they were masked with different keys.
    """
    told = {file: read_told(file) for file in files}
    first_file, first = next(iter(told.items()))
    for file, one in told.items():
        if (one.number, one.sites, len(one.words)) != (first.number, first.sites, len(first.words)):
            raise ValueError(
                f"{file} was masked with other keys than {first_file}; begin anew: keys of all sites, and all of them "
                "to every site"
            )
    names = sorted(one.site for one in told.values())
    if missing := sorted({*first.sites} - {*names}):
        raise ValueError(
            f"told= lacks the file of {', '.join(missing)}: without it the others' stay masked; add it, or begin anew "
            "without that site, with new keys"
        )
    if names != list(first.sites):
        raise ValueError(f"told= has the file of a site twice, or of a stranger ({', '.join(names)}); give each once")
    return reduce(add, (one.words for one in told.values())), first


def _digest(keys: Mapping[str, bytes]) -> bytes:
    return hashlib.sha256(json.dumps([[site, _text(keys[site])] for site in sorted(keys)]).encode()).digest()


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _json(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no file of this command; have it sent again") from error
    return found if isinstance(found, Mapping) else {}
