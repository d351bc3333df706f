"""Secure aggregation in a run: the server learns the sum of a round's updates, and no single one.

Every round takes four messages a site: ``keys``, ``shares``, the training task with the masked update as its answer,
and ``reveal``. What is secret lives in the process that serves the site, for one round. See `privacy.masks` for the
protocol and docs/privacy.md for what it does not cover.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedseg.federation.contract import Consult, ServerHalf, Transform
from fedseg.federation.state import State, Tensors, Update
from fedseg.federation.transforms import with_memories
from fedseg.privacy.payload import as_bytes, as_tensor, flat, public_scalars, restored, shapes
from fedseg.privacy.refusals import refuse_single

if TYPE_CHECKING:
    from fedseg.privacy.masks import MaskedSum, Party, Public

NAME = "masked"
GROUP, ROW = "sum:masked", "row"
KEYS, SEALED, SHARES = "keys", "sealed", "shares"
EXAMPLES = 3


class Masked(Transform):
    """Updates travel masked; masks cancel in the sum (Bonawitz et al., CCS 2017).

    A site multiplies its update by its number of images, and its weight is in the sum as well. The server still sees
    who takes part, the number of images, steps and seconds, scores, and every mean.
    """

    name = NAME
    least = 3
    lives_in = "site"

    def __init__(self) -> None:
        if find_spec("flwr") is None:
            raise ValueError('privacy.aggregation=masked needs Flower\'s key agreement; pip install -e ".[flower]"')
        self._parties: dict[str, Party] = {}
        self._sealed: dict[str, dict[str, bytes]] = {}

    def check(self, algorithm: ServerHalf) -> None:
        """Refuse methods that need more than a sum, or weights that a site cannot apply itself."""
        why = "privacy.aggregation=masked shows the server sums only"
        refuse_single(algorithm, why)
        if algorithm.weigh(State(), [Update(site="", examples=EXAMPLES)]) != [float(EXAMPLES)]:
            raise ValueError(f"{why}, so that sites weigh by their images; take algorithm.weighting=examples")

    def accumulator(self) -> MaskedRound:
        """One round at the server."""
        return MaskedRound()

    # ---------------------------------------------------------------- at a site

    def consulted(self, site: str, stage: str, message: State) -> State:
        """Answer one of the protocol's stages."""
        stages: dict[str, Callable[[str, State], State]] = {
            "keys": self._keys,
            "shares": self._shares,
            "train": self._train,
            "reveal": self._reveal,
        }
        if stage not in stages or (stage != "keys" and site not in self._parties):
            raise ValueError(f"it has no keys of this round for {stage[:20]!r}; was it restarted?")
        return stages[stage](site, message)

    def _enough(self, sites: int) -> None:
        if sites < self.least_here:
            raise ValueError(f"its terms (least_sites: {self.least_here}) let it into no sum of {sites} sites")

    def _keys(self, site: str, message: State) -> State:
        from fedseg.privacy.masks import Party

        self._enough(int(message.scalars.get("sites", 0)))

        self._sealed.pop(site, None)
        party = self._parties[site] = Party(site, threshold(int(message.scalars.get("sites", 0))))
        return State({KEYS: {name: as_tensor(key) for name, key in party.public._asdict().items()}})

    def _shares(self, site: str, message: State) -> State:
        from fedseg.privacy.masks import Public

        names = message.get(Public._fields[0])
        publics = {name: Public(*(as_bytes(message.get(f).get(name)) for f in Public._fields)) for name in names}
        party = self._parties[site]
        if threshold(len(publics)) > party.threshold:
            raise ValueError(f"{len(publics)} sites have keys, more than were announced")
        sealed = party.seal(publics)
        return State({SEALED: {peer: as_tensor(letter) for peer, letter in sealed.items()}})

    def _train(self, site: str, message: State) -> State:
        self._enough(1 + len(message.get(SEALED)))
        self._sealed[site] = {peer: as_bytes(letter) for peer, letter in message.get(SEALED).items()}
        return State()

    def _reveal(self, site: str, message: State) -> State:
        answered = [name for name, there in message.scalars.items() if there]
        dropped = [name for name, there in message.scalars.items() if not there]
        self._enough(len(answered))
        return State(
            {SHARES: {name: as_tensor(s) for name, s in self._parties[site].reveal(answered, dropped).items()}}
        )

    def on_client(self, update: Update, memory: State, seed: int) -> tuple[Update, State]:
        """Mask the weighted update and its weight; keep back the loss."""
        if update.site not in self._sealed:
            return replace(update, refusal="no shares of this round came with the task"), memory
        row = torch.cat([*(flat(update.tensors[group]) for group in sorted(update.tensors)), torch.ones(1)])
        try:
            words = self._parties[update.site].mask(row, float(update.examples), self._sealed.pop(update.site))
        except ValueError as error:
            return replace(update, refusal=str(error)), memory
        sent = {GROUP: {ROW: torch.from_numpy(words.view(np.int64))}}
        return replace(update, tensors=sent, scalars=public_scalars(update)), memory


class MaskedRound:
    """One round at the server: it holds masked rows, which are noise to it, and in the end their sum."""

    def __init__(self) -> None:
        self.total = 0.0
        self._shared: dict[str, Tensors] = {}
        self._threshold = 0
        self._sum: MaskedSum | None = None
        self._mean: dict[str, Tensors] = {}

    def begin(self, sites: Sequence[str], shared: Mapping[str, Tensors], consult: Consult) -> Mapping[str, State]:
        """Pass public keys and sealed shares around; sites that do not answer are left out."""
        from fedseg.privacy.masks import MaskedSum, Public

        self._shared, self._threshold = dict(shared), threshold(len(sites))
        hello = State(scalars={"sites": float(len(sites))})
        publics = consult(f"{NAME}/keys", dict.fromkeys(sites, hello), _public)
        if len(publics) <= self._threshold:
            return {}
        book = State({f: {site: as_tensor(getattr(keys, f)) for site, keys in publics.items()} for f in Public._fields})

        def letters(site: str, answer: State) -> dict[str, Tensor]:
            if answer.get(SEALED).keys() != publics.keys() - {site}:
                raise ValueError("it did not seal a share for every other site")
            return answer.get(SEALED)

        sealed = consult(f"{NAME}/shares", dict.fromkeys(publics, book), letters)
        if len(sealed) < max(self._threshold, Masked.least):
            return {}
        self._sum = MaskedSum({site: publics[site] for site in sealed})
        mail = {site: {peer: found[site] for peer, found in sealed.items() if peer != site} for site in sealed}
        return {site: with_memories(State(), {NAME: State({SEALED: letters})}) for site, letters in mail.items()}

    def add(self, update: Update, weight: float) -> None:
        """Take one masked row in.

        Raises:
            ValueError: it is not a row of the length that the shared tensors have.
        """
        row = update.get(GROUP).get(ROW)
        length = 1 + sum(t.numel() for tensors in self._shared.values() for t in tensors.values())
        if update.tensors.keys() != {GROUP} or row is None or row.dtype != torch.int64 or row.shape != (length,):
            raise ValueError(f"it did not send one row of {length} masked numbers")
        assert self._sum is not None
        self._sum.add(update.site, row.numpy().view(np.uint64))

    def end(self, consult: Consult) -> None:
        """Let those who answered reveal what unmasks the sum."""
        assert self._sum is not None
        fates = State(scalars={site: float(site in self._sum.answered) for site in self._sum.publics})
        revealed = consult(f"{NAME}/reveal", dict.fromkeys(self._sum.answered, fates), _revealed)
        row = self._sum.unmasked(revealed, self._threshold)
        self.total = float(row[-1])
        start = 0
        for group in sorted(self._shared):
            forms = shapes(self._shared[group])
            count = sum(t.numel() for t in self._shared[group].values())
            if self.total:
                self._mean[group] = restored((row[start : start + count] / self.total).float(), forms)
            start += count

    def result(self) -> State:
        """The mean of the updates."""
        return State(self._mean)


def threshold(sites: int) -> int:
    """Shares that open a secret: more than half of the sites, so that these never open both secrets of one of them.

    One fewer than there are sites at most, so that one may drop out.
    """
    return max(2, min(sites - 1, sites // 2 + 1))


def _public(site: str, answer: State) -> Public:
    from fedseg.privacy.masks import Public, checked

    return checked(site, Public(*(as_bytes(answer.get(KEYS).get(name)) for name in Public._fields)))


def _revealed(_site: str, answer: State) -> dict[str, bytes]:
    return {name: as_bytes(share) for name, share in answer.get(SHARES).items()}
