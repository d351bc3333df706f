"""What sums under a key that is split over the sites would cost with OpenFHE, and what is left without one share.

    python3.10 -m venv he && he/bin/pip install numpy openfhe==1.6.1.0.22.4
    OMP_NUM_THREADS=1 he/bin/python benchmarks/threshold.py
    OMP_NUM_THREADS=1 he/bin/python benchmarks/threshold.py 1575066 10      # numbers of an update, sites

Of the suite nothing is imported, since OpenFHE's wheels are for one Python each: 3.10 of Ubuntu 22.04, 3.12 of 24.04.
Every site makes its share of the key (`MultipartyKeyGen` on the public key of the one before), encrypts a row under the
joint public key, and opens the sum of all in part; the server adds, and fuses what it gets. CPU seconds, medians of
REPEATS, measured on one ciphertext and multiplied by how many an update takes. The last column is what the server, or
all sites but one, make of the sum without one share: its correlation with the sum, the largest of all choices; by
chance one is about the inverse square root of the numbers of a ciphertext.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import openfhe as fhe
from numpy.typing import NDArray

NUMBERS, SITES, REPEATS = 1_575_066, 5, 5
FIXED, MODULUS = 2**20, 1_073_479_681
"""Fixed-point steps of one, and BFV's modulus: a prime below 2^30, 1 more than a multiple of 2^17, so that it packs."""
T = TypeVar("T")
Row = NDArray[np.float64]


@dataclass(frozen=True)
class Scheme:
    """How a row becomes a ciphertext, and what it takes.

    Attributes:
        context: of OpenFHE.
        slots: numbers of a ciphertext.
        encode: a row -> plaintext.
        decode: plaintext -> a row.
    """

    context: Any
    slots: int
    encode: Callable[[Row], Any]
    decode: Callable[[Any], Row]


def ckks(kind: Any) -> Scheme:
    """CKKS without a multiplication, of 128 bits; what is no real number is refused, unless complex ones are wanted."""
    wanted = fhe.CCParamsCKKSRNS()
    wanted.SetMultiplicativeDepth(0)
    wanted.SetScalingModSize(40)
    wanted.SetCKKSDataType(kind)
    context = made(wanted)
    slots = context.GetRingDimension() // 2

    def decode(plain: Any) -> Row:
        plain.SetLength(slots)
        return np.array(plain.GetCKKSPackedValue()).real

    return Scheme(context, slots, lambda row: context.MakeCKKSPackedPlaintext(row.tolist()), decode)


def bfv() -> Scheme:
    """BFV on fixed-point numbers, with the noise flooding that OpenFHE has for BFV and BGV, not for CKKS."""
    wanted = fhe.CCParamsBFVRNS()
    wanted.SetMultiplicativeDepth(0)
    wanted.SetPlaintextModulus(MODULUS)
    wanted.SetMultipartyMode(fhe.NOISE_FLOODING_MULTIPARTY)
    context = made(wanted)
    slots = context.GetRingDimension()

    def decode(plain: Any) -> Row:
        plain.SetLength(slots)
        return np.array(plain.GetPackedValue(), np.float64) / FIXED

    def encode(row: Row) -> Any:
        return context.MakePackedPlaintext(np.rint(row * FIXED).astype(int).tolist())

    return Scheme(context, slots, encode, decode)


def made(wanted: Any) -> Any:
    """A context in which keys can be split."""
    wanted.SetSecurityLevel(fhe.HEStd_128_classic)
    context = fhe.GenCryptoContext(wanted)
    for feature in (fhe.PKE, fhe.KEYSWITCH, fhe.LEVELEDSHE, fhe.ADVANCEDSHE, fhe.MULTIPARTY):
        context.Enable(feature)
    return context


def shares(context: Any, sites: int) -> list[Any]:
    """A pair of keys for each site; the last public key is that of all together."""
    pairs = [context.KeyGen()]
    for _ in range(sites - 1):
        pairs.append(context.MultipartyKeyGen(pairs[-1].publicKey))
    return pairs


def opened(context: Any, total: Any, pairs: list[Any]) -> list[Any]:
    """What each site makes of the sum with its share alone."""
    lead, *others = (pair.secretKey for pair in pairs)
    first = context.MultipartyDecryptLead([total], lead)[0]
    return [first, *(context.MultipartyDecryptMain([total], key)[0] for key in others)]


def added(context: Any, ciphers: list[Any]) -> Any:
    """The sum of ciphertexts."""
    total, *others = ciphers
    for cipher in others:
        total = context.EvalAdd(total, cipher)
    return total


def seconds(work: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds of some work, and what it gives."""
    taken = []
    for _ in range(REPEATS):
        start = time.process_time()
        found = work()
        taken.append(time.process_time() - start)
    return statistics.median(taken), found


def rows_of(scheme: Scheme, sites: int) -> list[Row]:
    """A row of each site, of the size of updates."""
    return list(np.random.default_rng(0).normal(scale=1e-2, size=(sites, scheme.slots)))


def without_one(scheme: Scheme, sites: int) -> float:
    """The largest correlation with the sum of what is fused without one share."""
    context, rows, pairs = scheme.context, rows_of(scheme, sites), shares(scheme.context, sites)
    total = added(context, [context.Encrypt(pairs[-1].publicKey, scheme.encode(row)) for row in rows])
    parts = opened(context, total, pairs)
    left = [[part for part in parts if part is not missing] for missing in parts]
    seen = [scheme.decode(context.MultipartyDecryptFusion(some)) for some in left]
    return max(abs(float(np.corrcoef(row, sum(rows))[0, 1])) for row in seen)


def show(name: str, scheme: Scheme, sites: int, numbers: int, correlation: str, split: bool = True) -> None:
    """A row of the table."""
    context, rows, pairs = scheme.context, rows_of(scheme, sites), shares(scheme.context, sites if split else 1)
    times = -(-numbers // scheme.slots)
    encrypting, _ = seconds(lambda: context.Encrypt(pairs[-1].publicKey, scheme.encode(rows[0])))
    ciphers = [context.Encrypt(pairs[-1].publicKey, scheme.encode(row)) for row in rows]
    adding, total = seconds(lambda: added(context, ciphers))
    opening, fusing, size = 0.0, 0.0, len(fhe.Serialize(ciphers[0], fhe.BINARY))
    if split:
        opening, parts = seconds(lambda: opened(context, total, pairs))
        fusing, plain = seconds(lambda: context.MultipartyDecryptFusion(parts))
        size += len(fhe.Serialize(parts[-1], fhe.BINARY))
    else:
        fusing, plain = seconds(lambda: context.Decrypt(total, pairs[0].secretKey))
    off = float(np.abs(scheme.decode(plain) - sum(rows)).max())
    site, server = times * (encrypting + opening / sites), times * (adding + fusing)
    bits = np.log2(float(context.GetModulus()))
    print(
        f"{name:32}{context.GetRingDimension():7}{bits:6.0f}{times * size / 4 / numbers:8.1f}{site:9.2f}{server:10.2f}"
        f"{off:10.1e}{correlation:>14}",
        flush=True,
    )


def main(numbers: int = NUMBERS, sites: int = SITES) -> None:
    """Print the table."""
    print(f"an update of {numbers:,} numbers, {4 * numbers:,} bytes; {sites} sites\n")
    print(f"{'':32}{'degree':>7}{'bits':>6}{'times':>8}{'site s':>9}{'server s':>10}{'off by':>10}{'without one':>14}")
    show("CKKS, one key", ckks(fhe.REAL), sites, numbers, "", split=False)
    show("CKKS, a share each", ckks(fhe.REAL), sites, numbers, f"{without_one(ckks(fhe.COMPLEX), sites):.3f}")
    show("BFV, a share each, flooded", bfv(), sites, numbers, f"{without_one(bfv(), sites):.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
