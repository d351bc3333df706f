"""How often verdicts are wrong and right on federations with planted truths: `python -m benchmarks.verdicts`.

Scores are drawn (tests/federations.py): four sites, patients with one to four images each, three seeds, six methods
with luck of their own per patient, image, training and site. The first table counts federations whose answer is wrong,
and fails above 5 % (and three standard errors); the second tells how often a planted gain is found.
Half an hour on one core.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedseg.reporting.compare.verdicts import Verdict, verdicts
from tests.federations import World

RECOMMENDED = ("personal", "global", "alone")
WRONG: Mapping[str, tuple[World, Mapping[str, float], tuple[str, ...]]] = {
    "no difference": (World(), {}, RECOMMENDED),
    "no difference, splits follow the seed": (World(follow=True), {}, RECOMMENDED),
    "no difference, trainings vary much": (World(training=2, site=2), {}, RECOMMENDED),
    "no difference, one seed": (World(seeds=1, training=0, site=0), {}, RECOMMENDED),
    "personal over global, alone 3 above personal": (World(), {"personal": 3, "alone": 6}, ("personal", "global")),
    "global over personal, alone 3 above global": (World(), {"global": 3, "alone": 6}, ("personal", "global")),
    "personal over global, alone 2 above personal": (World(), {"personal": 3, "alone": 5}, ("personal",)),
}
"""Name -> world, truth in points, and the answers that would be wrong."""
GAINS, PATIENTS = (2, 4, 6, 8), (6, 12, 24, 48)
LIMIT = 0.05


def drawn(world: World, truth: Mapping[str, float], number: int) -> tuple[Verdict, list[Verdict]]:
    """The verdict on the mean over sites, and those of the sites."""
    first, *sites = verdicts(world.draw(number, truth))
    return first, sites


def wrong(name: str, trials: int) -> tuple[float, float, float]:
    """Share of federations that are wrong over sites, at some site, and anywhere."""
    world, truth, answers = WRONG[name]
    found = [drawn(world, truth, number) for number in range(trials)]
    over = np.array([first.answer in answers for first, _ in found])
    at = np.array([any(verdict.answer in answers for verdict in sites) for _, sites in found])
    return float(over.mean()), float(at.mean()), float((over | at).mean())


def power(world: World, gain: float, trials: int) -> tuple[float, float]:
    """Share of federations, and of sites, whose verdict is personal where personal models gain so much."""
    found = [drawn(world, {"personal": gain}, number) for number in range(trials)]
    at = [verdict.answer == "personal" for _, sites in found for verdict in sites]
    return float(np.mean([first.answer == "personal" for first, _ in found])), float(np.mean(at))


def main(trials: int = 500) -> int:
    """Print both tables; 1 if an error is too frequent."""
    allowed = LIMIT + 3 * float(np.sqrt(LIMIT * (1 - LIMIT) / trials))
    print(f"wrong answers in {trials} federations{'':<24}{'over sites':>12}{'some site':>12}{'anywhere':>12}")
    worst = 0.0
    for name in WRONG:
        shares = wrong(name, trials)
        worst = max(worst, *shares[:2])
        print(f"{name:<54}{''.join(f'{share:>12.1%}' for share in shares)}", flush=True)
    print(f"\n{'personal is chosen where it gains (over sites, site)':<54}" + "".join(f"{f'+{g}':>14}" for g in GAINS))
    worlds = {f"{n} patients a site, 3 seeds": World(patients=n) for n in PATIENTS}
    worlds |= {f"12 patients a site, {n} seeds": replace(World(), seeds=n) for n in (1, 5)}
    for name, world in worlds.items():
        cells = (power(world, gain, max(1, trials // 5)) for gain in GAINS)
        print(f"{name:<54}" + "".join(f"{over:>8.0%}{at:>6.0%}" for over, at in cells), flush=True)
    return int(worst > allowed)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2])))
