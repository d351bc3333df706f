"""Images in one style at all sites: what a method becomes when their data are harmonised."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from fedseg.algorithms.base import Algorithm
from fedseg.algorithms.functional.combat import Combat, adjustments
from fedseg.algorithms.functional.complexity import complexity
from fedseg.algorithms.functional.styles import Amplitude, Histogram, Moments, Style
from fedseg.algorithms.mixed import Mixed
from fedseg.algorithms.recipe import Training
from fedseg.federation.contract import Site, Task
from fedseg.federation.state import State, Tensors

STYLE, TARGET = "style", "style/target"
"""The group that a site tells once, and that of the target in every message. At the server the group
``style/target/<site>`` is a site's own target, and the number of that name says that its images stay as they are."""
COMPLEXITY = "complexity"
"""The group that a site tells once where the least complex one is the target."""

OF_SLICES = "training.harmonise=fda replaces amplitudes of slices, and histogram, zscore and combat know volumes"


class Harmonised(Algorithm):
    """A method whose images all get one style, before they are normalised, in training, scoring and use alike.

    Before round 1 every site tells the style of its training images; the target is the mean over the sites, or the
    style of one of them, whose images then stay as they are, and comes with every message. Masks are untouched.
    Augmented images are harmonised, too, so that what an augmentation changes of the style is taken away again. Without
    a message, as in a stock Trainer, images stay as they are.
    """

    prepares = "images take the style that the sites agreed on"
    _towards: Sequence[nn.Module] = ()  # the target of this turn, in a list: it is no part of the method's state

    @property
    @abstractmethod
    def style(self) -> Style:
        """What is told, and given to images."""

    def introduce(self, site: Site) -> State:
        """What the method tells, and the style of the training images."""
        told = super().introduce(site)
        style = self.style.told(batch["image"] for batch in site.plain_batches())
        return State({**told.tensors, STYLE: style}, told.scalars) if style else told

    def init_server(self, introductions: Mapping[str, State]) -> State:
        """The method's state, and the target.

        Raises:
            ValueError: sites tell styles of different shapes.
        """
        server = super().init_server(introductions)
        told = {site: told for site, told in introductions.items() if STYLE in told.tensors}
        if not told:
            return server
        agreed = self.agreed(told)
        return State({**server.tensors, **agreed.tensors}, {**server.scalars, **agreed.scalars})

    @property
    def founders_only(self) -> str:
        """As the method says: newcomers take the style that was agreed on, and have no part in it."""
        return super().founders_only

    def regrouped(self, server: State, arrived: Mapping[str, State], left: Collection[str]) -> State:
        """What was agreed on stays, whatever a site that leaves is called."""
        after = super().regrouped(server, arrived, left)
        return State({**after.tensors, **({TARGET: server[TARGET]} if TARGET in server.tensors else {})}, after.scalars)

    def agreed(self, told: Mapping[str, State]) -> State:
        """What the server holds of the styles: their mean."""
        return State({TARGET: mean_style({site: given[STYLE] for site, given in told.items()})})

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """The method's message, and the target."""
        message, own = super().broadcast(server, site, task), f"{TARGET}/{site}"
        target = {} if own in server.scalars else server.get(own) or server.get(TARGET)
        return State({**message.tensors, **({TARGET: target} if target else {})}, message.scalars)

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load what came; images get the style of the target."""
        super().receive(message, kept, site)
        target = message.get(TARGET)
        self._towards = [self.style.towards(target)] if target else []

    def answers_with(self) -> State:
        """What the method needs, and the target."""
        needed = super().answers_with()
        target = {TARGET: self.received[TARGET]} if TARGET in self.received.tensors else {}
        return State({**needed.tensors, **target}, needed.scalars)

    @property
    def preparation(self) -> nn.Module:
        """Give images the target's style, then normalise them."""
        return nn.Sequential(*self._towards, super().preparation)


class InStyle(Harmonised):
    """A method whose images are harmonised as `training.harmonise` says."""

    @property
    def style(self) -> Style:
        """The one that the setting names."""
        training = self.recipe.training
        styles: dict[str, Style] = {
            "histogram": Histogram(),
            "fda": Amplitude(training.harmonise_window),
            "zscore": Moments(),
        }
        return styles[training.harmonise]


class InStyleOfOne(InStyle):
    """A method whose images take the style of the least complex site, whose own stay as they are."""

    prepares = "images take the style of the least complex site, whose own stay as they are"
    prepares_by_site = True

    def introduce(self, site: Site) -> State:
        """What harmonising tells, and the complexity of the training images."""
        told = super().introduce(site)
        if STYLE not in told.tensors:
            return told
        numbers = complexity(batch["image"] for batch in site.plain_batches())
        return State({**told.tensors, COMPLEXITY: numbers}, told.scalars)

    @property
    def founders_only(self) -> str:
        """As the method says: the least complex of the sites that were there at the start stays the target."""
        return super().founders_only

    def agreed(self, told: Mapping[str, State]) -> State:
        """The style of the least complex site, and which one that is."""
        check_alike({site: given[STYLE] for site, given in told.items()})
        numbers = {
            site: tuple(float(given[COMPLEXITY][name]) for name in ("entropy", "spread"))
            for site, given in told.items()
        }
        least = min(sorted(numbers), key=numbers.__getitem__)
        return State({TARGET: told[least][STYLE]}, {f"{TARGET}/{least}": numbers[least][0]})


class Combatted(Harmonised):
    """A method whose images are adjusted by ComBat; those of a site that told nothing stay as they are."""

    prepares = "images of a site that took part are adjusted by what ComBat found out about it, others are not"
    prepares_by_site = True
    style = Combat()

    @property
    def founders_only(self) -> str:
        """An adjustment follows from what all sites told."""
        return "training.harmonise=combat adjusts the images of the sites that were there at the start"

    def agreed(self, told: Mapping[str, State]) -> State:
        """How the images of every site are adjusted."""
        sums = {site: given[STYLE] for site, given in told.items()}
        check_alike(sums)
        return State({f"{TARGET}/{site}": found for site, found in adjustments(sums).items()})


def harmonised(method: type[Algorithm], training: Training) -> type[Algorithm]:
    """The method, or what it becomes when its data are harmonised.

    Raises:
        ValueError: that would be undone, or undo what the method does.
    """
    if training.harmonise == "none":
        return method
    if reason := _obstacle(method, training):
        raise ValueError(reason)
    same = {"__doc__": method.__doc__, "__module__": method.__module__}
    others: dict[str, type[Algorithm]] = {"combat": Combatted, "mixstyle": Mixed}
    if training.harmonise in others:
        return type(method.__name__, (others[training.harmonise], method), same)
    base = InStyleOfOne if training.harmonise_target == "least_complex" else InStyle
    if training.harmonise == "fda":
        same["slices_only"] = OF_SLICES
    return type(method.__name__, (base, method), same)


def _obstacle(method: type[Algorithm], training: Training) -> str:
    """Why a method's data cannot be harmonised so, with the cure; empty if they can."""
    kind, name = training.harmonise, method.__name__
    to_one_site = training.harmonise_target == "least_complex"
    if method.styles_images:
        return (
            f"training.harmonise={kind} would take away the styles that {name} gives to images; take "
            "training.harmonise=none"
        )
    if kind == training.normalize == "zscore":
        return (
            "training.harmonise=zscore says nothing that training.normalize=zscore does not take away again; take "
            "training.harmonise=none, or training.normalize=imagenet"
        )
    if kind == "mixstyle" and training.normalize == "zscore" and not training.mixstyle_after:
        return (
            "training.harmonise=mixstyle mixes means and deviations of images, which are all the same after "
            "training.normalize=zscore; take training.normalize=imagenet, or name parts of the network in "
            "training.mixstyle_after"
        )
    if kind == "mixstyle" and not method.labelled:
        return (
            f"training.harmonise=mixstyle would mix the styles of images that {name} tells apart; take "
            "training.harmonise=none"
        )
    if kind in ("combat", "mixstyle") and to_one_site:
        return (
            f"training.harmonise={kind} has no target site; take training.harmonise_target=mean, or another harmonise"
        )
    if method.trains_on == "pool" and (kind == "combat" or to_one_site):
        asking = "_target=least_complex" if to_one_site else "=combat"
        cure = "_target=mean" if to_one_site else "=histogram"
        return (
            f"training.harmonise{asking} asks which site an image is from, and {name} trains on the images of all "
            f"sites together; take training.harmonise{cure}"
        )
    return ""


def mean_style(styles: Mapping[str, Tensors]) -> Tensors:
    """The mean over sites, in which every site counts the same.

    Args:
        styles: site -> what it told.

    Raises:
        ValueError: a site told something of another name or shape than the first one.
    """
    check_alike(styles)
    names = next(iter(styles.values()))
    return {name: torch.stack([told[name] for told in styles.values()]).mean(dim=0) for name in names}


def check_alike(styles: Mapping[str, Tensors]) -> None:
    """Refuse what cannot be one style.

    Raises:
        ValueError: a site told something of another name or shape than the first one.
    """
    (first, model), *_ = styles.items()
    expected = {name: tuple(t.shape) for name, t in model.items()}
    for site, told in styles.items():
        found = {name: tuple(t.shape) for name, t in told.items()}
        if found != expected:
            raise ValueError(
                f"site {site!r} tells a style of {found}, site {first!r} one of {expected}; give all sites one "
                "data.size and the same channels"
            )
