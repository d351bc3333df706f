"""Sums by masks that cancel: secure aggregation (Bonawitz et al., CCS 2017), one round of it.

Sites agree on a secret in pairs and add the stream that follows from it, one with plus, the other with minus, and a
stream of their own. In the sum the pairs' streams cancel. Shares of every site's secrets lie with its peers, so that
the streams of those who answered (own) or dropped out (pairs') can be taken off the sum; a peer never gives both kinds
of one site. A server that follows the protocol holds masked updates and the sum; it learns a single update only with as
many peers on its side as the threshold says. One that does not can tell sites different things about who is there, as
public keys and lists come through it: the protocol's rounds of signed keys and of consistency are not here.

Key agreement, sealing and Shamir's shares are Flower's; streams are ChaCha20, because Flower's own fold a secret to 32
bits (flwr 1.42). Stages, each one message a site: `public`, `seal`, `mask`, `reveal`.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]
FRACTION = 2.0**28
"""Fixed point: 28 bits behind the point, 35 before it, modulo 2^64."""
HEAD = 32
"""Bytes of a letter that say whose it is."""
LARGEST = 2.0**28
"""Of a weighted number; 127 of them fit into a sum."""


class Public(NamedTuple):
    """A site's public keys, and a hash that binds it to the secret of its own stream."""

    pair: bytes
    seal: bytes
    own: bytes


def checked(site: str, public: Public) -> Public:
    """The keys, if they are any.

    Raises:
        ValueError: they are not; peers could not work with them.
    """
    try:
        bytes_to_public_key(public.pair)
        bytes_to_public_key(public.seal)
    except Exception as error:  # whatever the library makes of foreign bytes
        raise ValueError(f"site {site!r} sent no public keys") from error
    return public


class Party:
    """One site in one round.

    Args:
        name: its own.
        threshold: shares that open a secret, at least 2; fewer peers than that learn nothing.
    """

    def __init__(self, name: str, threshold: int) -> None:
        if threshold < 2:
            raise ValueError(f"threshold={threshold}: one peer alone could open a secret; take 2 or more")
        self.name, self.threshold = name, threshold
        self._pair, pair = generate_key_pairs()
        self._seal, seal = generate_key_pairs()
        self._own = os.urandom(32)
        self.public = Public(public_key_to_bytes(pair), public_key_to_bytes(seal), _hash(self._own))
        self._peers: dict[str, Public] = {}
        self._shares: dict[str, tuple[bytes, bytes]] = {}
        self._with: frozenset[str] = frozenset()  # whose pairs' streams are on the row
        self._revealed = False
        self._book = b""

    def seal(self, publics: Mapping[str, Public]) -> dict[str, bytes]:
        """Shares of this site's secrets, sealed for each peer.

        Raises:
            ValueError: too few sites for the threshold, or this site's keys were exchanged for others.
        """
        if publics.get(self.name) != self.public:
            raise ValueError(f"site {self.name!r}: these are not its own public keys")
        if len(publics) <= self.threshold or len({key for keys in publics.values() for key in keys}) < 3 * len(publics):
            raise ValueError(f"{len(publics)} sites with keys of their own, more than {self.threshold} are needed")
        self._peers = {name: publics[name] for name in sorted(publics) if name != self.name}
        own = create_shares(self._own, self.threshold, len(publics))
        pair = create_shares(private_key_to_bytes(self._pair), self.threshold, len(publics))
        self._shares[self.name] = own.pop(), pair.pop()
        lengths = [len(share).to_bytes(4, "little") for share in own]
        self._book = _digest(*(part for name in sorted(publics) for part in (name.encode(), *publics[name])))
        packed = zip(self._peers, lengths, own, pair, strict=True)
        return {
            name: encrypt(self._sealing(name), self._head(self.name, name) + n + first + second)
            for name, n, first, second in packed
        }

    def mask(self, row: Tensor, weight: float, sealed: Mapping[str, bytes]) -> Words:
        """The weighted row, masked.

        Args:
            row: (N,) numbers; weighted they must lie within 2^28.
            weight: applied here, since the server cannot weigh what it cannot read.
            sealed: peer -> what it sealed for this site; peers that are missing dropped out before.

        Raises:
            ValueError: a second row, a share that does not open, a stranger, or numbers that do not fit.
        """
        if self._with:
            raise ValueError(f"site {self.name!r} has masked a row already; two under one mask show their difference")
        if strangers := sorted(sealed.keys() - self._peers.keys()):
            raise ValueError(f"site {self.name!r} got shares of {strangers[0]!r}, whose keys it does not know")
        if len(sealed) + 1 < self.threshold:
            raise ValueError(f"shares of {len(sealed)} peers came, {self.threshold - 1} are needed")
        for name, message in sealed.items():
            try:
                opened = decrypt(self._sealing(name), message)
            except InvalidToken as error:
                raise ValueError(f"the share that {name!r} sealed for site {self.name!r} does not open") from error
            head, length, shares = opened[:HEAD], opened[HEAD : HEAD + 4], opened[HEAD + 4 :]
            if head != self._head(name, self.name):
                raise ValueError(
                    f"what came as {name!r}'s share for site {self.name!r} was sealed by or for another one"
                )
            cut = int.from_bytes(length, "little")
            self._shares[name] = shares[:cut], shares[cut:]
        self._with = frozenset({self.name, *sealed})
        masked = fixed_point(row, weight) + stream(self._own, len(row))
        for name in sealed:
            secret = generate_shared_key(self._pair, bytes_to_public_key(self._peers[name].pair))
            masked = _add(masked, stream(base64.urlsafe_b64decode(secret), len(row)), self.name < name)
        return masked

    def reveal(self, answered: Iterable[str], dropped: Iterable[str]) -> dict[str, bytes]:
        """Shares that unmask the sum: of own streams of those who answered, of pairs' keys of those who did not.

        Raises:
            ValueError: these are not the sites whose masks are on the row, a site is said to have done both, so few
                answered that their sum tells of single ones, or this is the second time: two different answers could
                give both secrets of a site.
        """
        there, gone = set(answered), set(dropped)
        if self._revealed:
            raise ValueError(f"site {self.name!r} has unmasked the sum of this round already")
        if there & gone or there | gone != self._with or len(there) < self.threshold:
            raise ValueError(f"site {self.name!r} unmasks no sum of {sorted(there)} without {sorted(gone)}")
        self._revealed = True
        own = {name: self._shares[name][0] for name in sorted(there & self._shares.keys())}
        return own | {name: self._shares[name][1] for name in sorted(gone & self._shares.keys())}

    def _head(self, sender: str, receiver: str) -> bytes:
        """Binds a letter to both ends, and to the keys of all as its sender knows them."""
        return _digest(sender.encode(), receiver.encode(), self._book)

    def _sealing(self, peer: str) -> bytes:
        return generate_shared_key(self._seal, bytes_to_public_key(self._peers[peer].seal))


class MaskedSum:
    """At the server: adds masked rows, and takes off what does not cancel.

    Args:
        publics: keys of all sites that sealed shares.
    """

    def __init__(self, publics: Mapping[str, Public]) -> None:
        self.publics = dict(publics)
        self.answered: list[str] = []
        self._sum: Words | None = None

    @property
    def dropped(self) -> list[str]:
        """Sites that sealed shares and did not answer."""
        return sorted(self.publics.keys() - set(self.answered))

    def add(self, site: str, masked: Words) -> None:
        """Take a masked row in.

        Raises:
            ValueError: a stranger, a second row of one site, or another length.
        """
        if site not in self.publics or site in self.answered:
            raise ValueError(f"site {site!r} has no part in this sum, or has it already")
        if self._sum is not None and len(masked) != len(self._sum):
            raise ValueError(f"site {site!r} sent {len(masked)} numbers, the others {len(self._sum)}")
        self._sum = masked.copy() if self._sum is None else self._sum + masked
        self.answered.append(site)

    def unmasked(self, revealed: Mapping[str, Mapping[str, bytes]], threshold: int) -> Tensor:
        """The sum of the weighted rows of all who answered.

        Args:
            revealed: site -> what it revealed.
            threshold: shares that open a secret.

        Raises:
            ValueError: too few shares of some site, shares that are not of its secret, or nobody answered.
        """
        if self._sum is None:
            raise ValueError("no site answered")
        total = self._sum
        for site in self.answered:
            own = _opened(site, revealed, threshold)
            if _hash(own) != self.publics[site].own:
                raise ValueError(f"the shares of site {site!r} are not of its secret; some peer sent a wrong one")
            total = _add(total, stream(own, len(total)), False)
        for gone in self.dropped:
            key = _pair_key(_opened(gone, revealed, threshold), self.publics[gone].pair, gone)
            for site in self.answered:
                secret = generate_shared_key(key, bytes_to_public_key(self.publics[site].pair))
                total = _add(total, stream(base64.urlsafe_b64decode(secret), len(total)), not site < gone)
        return torch.from_numpy(total.view(np.int64) / FRACTION)


def fixed_point(row: Tensor, weight: float) -> Words:
    """Numbers as whole multiples of 2^-28, modulo 2^64.

    Raises:
        ValueError: one is not finite or too large.
    """
    weighted = row.double() * weight
    if not bool((weighted.abs() < LARGEST).all()):
        raise ValueError(f"weighted by {weight}, an update does not lie within {LARGEST:g}")
    return (weighted * FRACTION).round().to(torch.int64).numpy().view(np.uint64)


def stream(secret: bytes, count: int) -> Words:
    """That many pseudo-random 64-bit words of ChaCha20; a secret serves for one stream only."""
    cipher = Cipher(ChaCha20(secret, bytes(16)), mode=None).encryptor()
    return np.frombuffer(cipher.update(bytes(8 * count)), np.uint64)


def _hash(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _digest(*parts: bytes) -> bytes:
    """Of several parts, each with its length before it."""
    return _hash(b"".join(len(part).to_bytes(4, "little") + part for part in parts))


def _pair_key(content: bytes, public: bytes, site: str) -> Any:
    try:
        key = bytes_to_private_key(content)
        fits = public_key_to_bytes(key.public_key()) == public
    except Exception as error:  # whatever the library makes of foreign bytes
        raise ValueError(f"the shares of site {site!r} are not of its key; some peer sent a wrong one") from error
    if not fits:
        raise ValueError(f"the shares of site {site!r} are not of its key; some peer sent a wrong one")
    return key


def _add(total: Words, words: Words, plus: bool) -> Words:
    return total + words if plus else total - words


def _opened(site: str, revealed: Mapping[str, Mapping[str, bytes]], threshold: int) -> bytes:
    shares = [told[site] for told in revealed.values() if site in told]
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares of site {site!r}, {threshold} are needed to unmask the sum")
    try:
        return bytes(combine_shares(shares[:threshold]))
    except Exception as error:  # whatever the library makes of foreign bytes
        raise ValueError(f"the shares of site {site!r} do not fit together; some peer sent a wrong one") from error
