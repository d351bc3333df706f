"""The transforms that settings describe, in the order in which an update passes them."""

from __future__ import annotations

from fedseg.federation.contract import Guarantee, Transform
from fedseg.privacy.accounting import Account
from fedseg.privacy.compression import Cast, TopK
from fedseg.privacy.encryption import Encrypted, KeyHolder
from fedseg.privacy.masked import Masked
from fedseg.privacy.patient_level import PatientLevel
from fedseg.privacy.settings import Compression, Privacy
from fedseg.privacy.site_level import SiteLevel
from fedseg.privacy.sparse_vector import SparseVector


def build_transforms(privacy: Privacy, compression: Compression, rate: float) -> tuple[Transform, ...]:
    """What happens to an update: large coordinates are chosen, then it is made private, then rounded.

    Args:
        privacy: the mechanism.
        compression: of what travels.
        rate: probability that a site takes part in a round; 1 where it is not drawn independently of the others.

    Raises:
        ValueError: settings that do not go together, or a library that is missing.
    """
    transforms: list[Transform] = []
    if compression.top_k is not None:
        transforms.append(TopK(compression.top_k))
    if privacy.mechanism != "none":
        transforms.append(_mechanism(privacy, rate))
    if privacy.aggregation != "plain":
        _refuse_beside(privacy, compression)
        transforms.append(Masked() if privacy.aggregation == "masked" else Encrypted(KeyHolder()))
    if compression.cast != "none":
        transforms.append(Cast(compression.cast))
    return tuple(transforms)


def _mechanism(privacy: Privacy, rate: float) -> Transform:
    unit = "patient" if privacy.mechanism == "patient" else "site"
    account = Account(Guarantee(unit, privacy.delta, privacy.max_epsilon), privacy.accountant)
    if privacy.mechanism == "site":
        return SiteLevel(privacy.clip, privacy.noise, account, rate, privacy.randomness)
    if privacy.mechanism == "sparse":
        chosen = (privacy.clip, privacy.share, privacy.epsilon_round)
        return SparseVector(*chosen, account, privacy.randomness, privacy.threshold)
    return PatientLevel(privacy.candidates, account, privacy.epsilon_choice)


def _refuse_beside(privacy: Privacy, compression: Compression) -> None:
    told = {
        f"compression.top_k={compression.top_k}": compression.top_k is not None,
        f"compression.cast={compression.cast}": compression.cast != "none",
        "privacy.mechanism=sparse": privacy.mechanism == "sparse",
    }
    if beside := [setting for setting, given in told.items() if given]:
        raise ValueError(
            f"privacy.aggregation={privacy.aggregation} adds up whole updates; it cannot go with {', '.join(beside)}"
        )
