"""Sums of updates that the server cannot read, by CKKS (Cheon et al., ASIACRYPT 2017) through TenSEAL."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from fedseg.federation.contract import Cohort, ServerHalf, Transform
from fedseg.federation.state import State, Tensors, Update
from fedseg.privacy.payload import SHAPES, as_bytes, as_tensor, flat, public_scalars, restored, shapes
from fedseg.privacy.refusals import refuse_single

CIPHER, TOTAL = "cipher", "total"
DEGREE, MODULI, SCALE = 8192, (60, 40, 60), 2**40
"""128 bits of security; one multiplication, by a site's weight."""
SLOTS = DEGREE // 2


class KeyHolder:
    """Holds the secret key: the sites together, or an authority that they trust and that is not the server.

    In a simulation it lives in the same process as all others.
    """

    def __init__(self) -> None:
        if find_spec("tenseal") is None:
            raise ValueError('privacy.aggregation=encrypted needs TenSEAL; pip install -e ".[encryption]"')
        import tenseal

        self._context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=list(MODULI))
        self._context.global_scale = SCALE

    def public(self) -> Any:
        """What encrypts and adds, without the secret key."""
        import tenseal

        return tenseal.context_from(self._context.serialize(save_secret_key=False))

    def decrypt(self, state: State, contributions: int) -> dict[str, Tensors]:
        """The groups of a sum.

        Args:
            state: groups ``group:cipher`` and ``group:shapes``.
            contributions: how many updates the server says it added.

        Raises:
            ValueError: fewer than two, so that the sum would be a site's own update.
        """
        if contributions < 2:
            raise ValueError(f"the sum of {contributions} updates would show a site's own; federation.min_sites=2")
        import tenseal

        opened = {}
        for part, tensors in state.tensors.items():
            group, _, kind = part.partition(":")
            if kind == CIPHER:
                in_order = [tensors[str(number)] for number in range(len(tensors))]
                pieces = [tenseal.ckks_vector_from(self._context, as_bytes(t)).decrypt() for t in in_order]
                row = torch.tensor([number for piece in pieces for number in piece], dtype=torch.float64)
                opened[group] = restored(row.float(), state[f"{group}:{SHAPES}"])
        return opened


class EncryptedSum:
    """At the server: adds weighted ciphertexts up, with public keys only.

    Args:
        context: without the secret key.
    """

    def __init__(self, context: Any) -> None:
        if context.is_private():
            raise ValueError("the server must not hold the secret key")
        self.context = context
        self.total = 0.0
        self._sums: dict[str, dict[str, Any]] = {}
        self._shapes: dict[str, Tensors] = {}

    def add(self, update: Update, weight: float) -> None:
        """Take one update in.

        Raises:
            ValueError: its groups or shapes are not those of the first one, or it cannot be read.
        """
        if weight < 0:
            raise ValueError(f"site {update.site!r} has the negative weight {weight}")
        if not weight:
            return
        told = {part: ts for part, ts in update.tensors.items() if part.endswith(f":{SHAPES}")}
        if not self._shapes:
            self._shapes = told
        if not _same(self._shapes, told):
            raise ValueError(f"site {update.site!r} sent other tensors than the sites before it")
        read = {
            part: self._read(part, tensors, weight, update.site)
            for part, tensors in update.tensors.items()
            if part.endswith(f":{CIPHER}")
        }
        for part, ciphers in read.items():  # only now, so that nothing of an update that cannot be read is in the sum
            sums = self._sums.setdefault(part, {})
            for name, cipher in ciphers.items():
                sums[name] = sums[name] + cipher if name in sums else cipher
        self.total += weight

    def _read(self, part: str, tensors: Tensors, weight: float, site: str) -> dict[str, Any]:
        import tenseal

        sums = self._sums.get(part)
        if sums and sums.keys() != tensors.keys():
            raise ValueError(f"site {site!r} sent {len(tensors)} ciphertexts in {part!r}, the others {len(sums)}")
        try:
            return {name: tenseal.ckks_vector_from(self.context, as_bytes(t)) * weight for name, t in tensors.items()}
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"site {site!r} sent something in {part!r} that is no ciphertext: {error}") from error

    def result(self) -> State:
        """The encrypted sum, and the sum of the weights."""
        sums = {
            part: {name: as_tensor(c.serialize()) for name, c in ciphers.items()}
            for part, ciphers in self._sums.items()
        }
        return State({**sums, **self._shapes}, {TOTAL: self.total})


class Encrypted(Transform):
    """Updates travel as CKKS ciphertexts; only the decrypted mean is ever in the clear at the server.

    What the server still sees: who takes part, the number of images, steps and seconds, and every mean. Whoever holds
    the key and a site's message reads that site's update, so the holder must not be the server.

    Args:
        keys: who decrypts sums.
    """

    name = "encrypted"
    least = 2
    lives_in = "run"

    def __init__(self, keys: KeyHolder) -> None:
        self.keys = keys
        self.context = keys.public()

    def check(self, algorithm: ServerHalf) -> None:
        """Refuse methods that need more than a sum."""
        refuse_single(algorithm, "privacy.aggregation=encrypted shows the server sums only")

    def on_client(self, update: Update, memory: State, seed: int) -> tuple[Update, State]:
        """Encrypt every group; keep back the loss."""
        import tenseal

        sent: dict[str, Tensors] = {}
        for group, tensors in update.tensors.items():
            row = flat(tensors).double().numpy()
            pieces = [row[start : start + SLOTS].tolist() for start in range(0, len(row), SLOTS)]
            ciphers = (tenseal.ckks_vector(self.context, piece).serialize() for piece in pieces)
            sent[f"{group}:{CIPHER}"] = {str(number): as_tensor(cipher) for number, cipher in enumerate(ciphers)}
            sent[f"{group}:{SHAPES}"] = shapes(tensors)
        return replace(update, tensors=sent, scalars=public_scalars(update)), memory

    def accumulator(self) -> EncryptedSum:
        """Adds ciphertexts."""
        return EncryptedSum(self.context)

    def on_server(self, mean: State, cohort: Cohort, memory: State, seed: int) -> tuple[State, State]:
        """Ask the holder of the key for the sum, and divide it by the weights."""
        opened = self.keys.decrypt(mean, cohort.usable)
        total = mean.scalars[TOTAL]
        return State({group: {name: t / total for name, t in ts.items()} for group, ts in opened.items()}), memory


def _same(one: dict[str, Tensors], other: dict[str, Tensors]) -> bool:
    return one.keys() == other.keys() and all(
        one[part].keys() == other[part].keys()
        and all(torch.equal(t, other[part][name]) for name, t in one[part].items())
        for part in one
    )
