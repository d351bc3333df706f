"""Secure aggregation: the sum is right, single rows are noise, and sites may drop out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedseg.privacy.masks import FRACTION, MaskedSum, Party, Words, fixed_point, stream

SITES = ["a", "b", "c", "d", "e"]
THRESHOLD = 3


def rows(count: int = 500) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {site: torch.randn(count, generator=generator) * 0.1 for site in SITES}


class Round:
    """One round, played stage by stage; sites in `silent` seal their shares and then say nothing more."""

    def __init__(self, silent: set[str], late: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.rows = rows()
        self.parties = {site: Party(site, THRESHOLD) for site in SITES}
        self.publics = {site: party.public for site, party in self.parties.items()}
        sealed = {site: party.seal(self.publics) for site, party in self.parties.items()}
        self.masked: dict[str, Words] = {}
        self.server = MaskedSum(self.publics)
        for index, (site, party) in enumerate(self.parties.items()):
            for_it = {peer: letters[site] for peer, letters in sealed.items() if peer != site}
            if site not in silent:
                self.masked[site] = party.mask(self.rows[site], index + 1.0, for_it)
                self.server.add(site, self.masked[site])
        answers = [site for site in self.server.answered if site not in late]
        self.revealed = {s: self.parties[s].reveal(self.server.answered, self.server.dropped) for s in answers}

    def expected(self) -> Tensor:
        weights = {site: index + 1.0 for index, site in enumerate(SITES)}
        return torch.stack([self.rows[site].double() * weights[site] for site in self.server.answered]).sum(dim=0)


@pytest.mark.parametrize("silent", [set(), {"b"}, {"a", "e"}])
def test_the_sum_is_that_of_those_who_answered(silent: set[str]) -> None:
    played = Round(silent)
    assert played.server.dropped == sorted(silent)
    total = played.server.unmasked(played.revealed, THRESHOLD)
    torch.testing.assert_close(total, played.expected(), rtol=0, atol=len(SITES) / FRACTION)


def test_a_site_that_falls_silent_after_its_row_still_counts() -> None:
    played = Round({"b"}, late={"c"})
    assert set(played.revealed) == {"a", "d", "e"}
    total = played.server.unmasked(played.revealed, THRESHOLD)
    torch.testing.assert_close(total, played.expected(), rtol=0, atol=len(SITES) / FRACTION)


def test_too_few_shares_open_nothing() -> None:
    played = Round(set())
    few = {site: played.revealed[site] for site in ("a", "b")}
    with pytest.raises(ValueError, match="2 shares of site 'a', 3 are needed"):
        played.server.unmasked(few, THRESHOLD)


def test_a_masked_row_looks_like_noise_whatever_is_in_it() -> None:
    """Bytes are uniform (chi-squared), and two rows of one site have nothing in common, even rows of zeros."""
    count = 20_000
    drawn = []
    for value in (torch.zeros(count), torch.full((count,), 0.5)):
        parties = {site: Party(site, 2) for site in "abc"}
        publics = {site: party.public for site, party in parties.items()}
        sealed = {site: party.seal(publics) for site, party in parties.items()}
        drawn.append(parties["b"].mask(value, 1.0, {peer: sealed[peer]["b"] for peer in "ac"}))
    for words in drawn:
        counts = np.bincount(words.view(np.uint8), minlength=256)
        expected = 8 * count / 256
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert 255 - 6 * (2 * 255) ** 0.5 < chi_squared < 255 + 6 * (2 * 255) ** 0.5
    as_numbers = [words.view(np.int64).astype(float) for words in drawn]
    assert abs(np.corrcoef(*as_numbers)[0, 1]) < 0.04
    assert float((drawn[0] == drawn[1]).mean()) == 0


def test_a_partial_sum_is_noise_as_well() -> None:
    played = Round(set())
    partial = played.masked["a"] + played.masked["b"] + played.masked["c"] + played.masked["d"]
    true = torch.stack([played.rows[s].double() * w for s, w in zip("abcd", (1, 2, 3, 4), strict=True)]).sum(dim=0)
    apart = np.abs((partial - fixed_point(true, 1.0)).view(np.int64) / FRACTION)
    assert float(np.median(apart)) > 1e9


def test_peers_never_give_both_secrets_of_a_site_nor_open_small_sums() -> None:
    played = Round({"b"})
    with pytest.raises(ValueError, match="already"):
        played.parties["a"].reveal(["a", "b", "d"], ["c"])
    party = Party("a", THRESHOLD)
    with pytest.raises(ValueError, match="unmasks no sum"):
        party.reveal(["a", "b", "c", "d"], ["b"])
    with pytest.raises(ValueError, match=r"unmasks no sum of \['c'\]"):
        party.reveal(["c"], ["a", "b", "d", "e"])


def test_exchanged_keys_and_too_few_sites_are_refused() -> None:
    parties = {site: Party(site, 2) for site in "abc"}
    publics = {site: party.public for site, party in parties.items()}
    with pytest.raises(ValueError, match="not its own public keys"):
        parties["a"].seal({**publics, "a": Party("a", 2).public})
    with pytest.raises(ValueError, match="more than 2 are needed"):
        parties["a"].seal({**publics, "b": publics["c"]})
    with pytest.raises(ValueError, match="more than 2 are needed"):
        parties["a"].seal({site: publics[site] for site in "ab"})
    with pytest.raises(ValueError, match="threshold=1"):
        Party("a", 1)


def test_letters_that_a_server_returns_swaps_or_seals_by_other_keys_are_refused() -> None:
    parties = {site: Party(site, 2) for site in "abcd"}
    publics = {site: party.public for site, party in parties.items()}
    letters = {site: party.seal(publics) for site, party in parties.items()}
    row = torch.ones(3)
    for told, reason in (
        ({"b": letters["a"]["b"], "c": letters["c"]["a"]}, "came as 'b'"),  # its own, returned
        ({"b": letters["b"]["a"], "c": letters["c"]["d"]}, "does not open"),  # another site's
    ):
        with pytest.raises(ValueError, match=reason):
            parties["a"].mask(row, 1.0, told)
    split = Party("b", 2)  # to b the server tells other keys of d than to a
    publics["b"] = split.public
    parties["a"].seal(publics)
    letter = split.seal({**publics, "d": Party("d", 2).public})["a"]
    with pytest.raises(ValueError, match="was sealed by or for another one"):
        parties["a"].mask(row, 1.0, {"b": letter})
    assert parties["c"].mask(row, 1.0, {site: letters[site]["c"] for site in "abd"}).shape == (3,)


def test_strangers_repeats_and_other_lengths_are_refused_by_name() -> None:
    server = MaskedSum({site: Party(site, 2).public for site in "abc"})
    server.add("a", np.zeros(3, np.uint64))
    for site, length, reason in (("x", 3, "no part"), ("a", 3, "already"), ("b", 4, "4 numbers, the others 3")):
        with pytest.raises(ValueError, match=rf"site '{site}'.*{reason}"):
            server.add(site, np.zeros(length, np.uint64))


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 2.0**29])
def test_numbers_that_do_not_fit_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="does not lie within"):
        fixed_point(torch.tensor([value]), 1.0)


def test_streams_depend_on_all_of_the_secret() -> None:
    secret = bytes(32)
    first = stream(secret, 4)
    for place in range(32):
        changed = bytearray(secret)
        changed[place] ^= 1
        assert not (stream(bytes(changed), 4) == first).any()
