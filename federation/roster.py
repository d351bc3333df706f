"""Who takes part in which round, where sites come later, leave, or come back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedseg.common.names import nearest


@dataclass(frozen=True)
class Roster:
    """The sites of a run, round by round.

    Attributes:
        sites: all that ever take part, in the order in which they are averaged.
        arrives: site -> first round in which it takes part; from 1 where it is not named.
        leaves: site -> first round in which it no longer does. Before the round in which it arrives: it comes back.
    """

    sites: Sequence[str]
    arrives: Mapping[str, int] = field(default_factory=dict)
    leaves: Mapping[str, int] = field(default_factory=dict)

    @property
    def changes(self) -> list[int]:
        """Rounds before which somebody arrives or leaves."""
        return sorted({*self.arrives.values(), *self.leaves.values()})

    def members(self, round: int) -> list[str]:
        """Sites that can be asked in a round."""
        return [site for site in self.sites if self._there(site, round)]

    def arriving(self, round: int) -> list[str]:
        """Sites that can be asked in a round and could not in the one before; nobody arrives in the first."""
        return [site for site in self.members(round) if round > 1 and not self._there(site, round - 1)]

    def leaving(self, round: int) -> list[str]:
        """Sites that could be asked in the round before and can no longer."""
        return [site for site in self.sites if self._there(site, round - 1) and not self._there(site, round)]

    def later(self, round: int) -> list[str]:
        """Sites that can be asked in some round after this one."""
        rounds = {round + 1, *(change for change in self.changes if change > round)}
        return [site for site in self.sites if any(self._there(site, one) for one in rounds)]

    def since(self, round: int) -> int:
        """The round from which on the sites are those of this round."""
        return max((change for change in self.changes if change <= round), default=1)

    def check(self) -> None:
        """Whether every site that is named takes part at all.

        Raises:
            ValueError: naming one that does not.
        """
        for name in ("arrives", "leaves"):
            for site in getattr(self, name):
                if site not in self.sites:
                    raise ValueError(
                        f"federation.{name} names {site!r}, which is no site that trains; {nearest(site, self.sites)}"
                    )
        for round in (1, *self.changes):
            if not self.members(round):
                raise ValueError(
                    f"federation.arrives and federation.leaves let no site take part in round {round}; let one stay"
                )

    def _there(self, site: str, round: int) -> bool:
        arrives, leaves = self.arrives.get(site, 1), self.leaves.get(site, math.inf)
        if leaves < arrives:
            return 1 <= round < leaves or round >= arrives
        return arrives <= round < leaves
