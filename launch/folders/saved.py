"""The models that a run saved, one by one and without its data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedseg.algorithms import Algorithm
from fedseg.algorithms.parts import FROZEN
from fedseg.common.names import nearest
from fedseg.common.seeds import derive_seed
from fedseg.federation.checkpoint import Best
from fedseg.federation.client import seed_everything
from fedseg.federation.contract import Batch, EvaluateTask
from fedseg.federation.state import State
from fedseg.launch.folders.reopen import Reopened
from fedseg.launch.folders.restore import read_kept, read_server
from fedseg.launch.networks import told
from fedseg.launch.scores.scoring import ADAPTED, SERVED_ELSEWHERE, fit_to, fitted_views, per_case
from fedseg.launch.settings import Evaluation
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.summary import ENTROPY, LAST, OWN_STATISTICS

NEW = "new images"
"""In place of a site's name for images from elsewhere."""
Chosen = Literal["best", "last"]
FITTED = (ADAPTED, OWN_STATISTICS, ENTROPY)
"""Views that are made for given images, without labels."""


def network_view(view: str) -> str:
    """The method's view whose network answers; what is fitted to images is the global one after `SavedModels.load`."""
    return "global" if view in (OWN_STATISTICS, ENTROPY) else view


@dataclass
class NamedSite:
    """A site of which nothing but the name is here: enough to load its model, not to train."""

    name: str
    index: int = -1
    seen: bool = True
    examples: int = 0
    training_images: int = 0
    patients: int = 0

    def at(self, round: int) -> NamedSite:
        """No data come later."""
        return self

    def covered(self) -> Tensor:
        """There are no cases."""
        return torch.zeros(0, 1)

    def steps(self, epochs: float = 1.0, labelled: bool = True) -> int:
        """There are none."""
        return 0

    def train_batches(self, seed: int, steps: int) -> Iterable[Batch]:
        """There are none."""
        return ()

    def patient_batches(self, seed: int, steps: int, rate: float) -> Iterable[Batch]:
        """There are none."""
        return ()

    def unlabelled_batches(self, seed: int, steps: int, views: int = 1) -> Iterable[Batch]:
        """There are none."""
        return ()

    def plain_batches(self) -> Iterable[Batch]:
        """There are none."""
        return ()

    def eval_batches(self, split: str) -> Iterable[Batch]:
        """There are none."""
        return ()

    def input_batches(self, split: str) -> Iterable[Batch]:
        """There are none."""
        return ()


class SavedModels:
    """What a run's folder can predict with.

    Args:
        run: its data need not be there.

    Attributes:
        channels: of the network's input.
        values: types that the images of training had once read, "uint8" of 8-bit files and "float32"; empty where a run
            does not say.

    Raises:
        ReportingError: the folder does not say what the network takes, or which sites there were, or a setting of the
            run can no longer be used.
    """

    def __init__(self, run: Reopened) -> None:
        self.run = run
        self.channels, self.values = _inputs(run.folder)
        self.method = self._made()
        splits = run.folder.splits()
        if splits.empty:
            raise ReportingError(
                f"{run.folder.path}: splits.csv is missing or empty; restore it from a copy of the run"
            )
        seen = splits.groupby("site", sort=True)["seen"].first()
        self.seen = [str(site) for site in seen.index[seen]]
        self.unseen = [str(site) for site in seen.index[~seen]]
        learnt = (splits["split"] == "train") & splits["seen"]
        self.taught = learnt if self.method.learns_unlabelled else learnt & splits["labelled"]
        self.trained = set(splits[self.taught]["site"])

    @property
    def title(self) -> str:
        """The run's folder and method."""
        return f"{self.run.folder.path} (algorithm={self.run.experiment.config.algorithm.preset})"

    def views(self, site: str | None) -> tuple[str, ...]:
        """Views of a site's images; None is a place that took no part in the run.

        Raises:
            ReportingError: no such site.
        """
        if site is None or site in self.unseen:
            there = self.method.unseen_views
            made = (fitted for view in there for fitted in fitted_views(self.method, view, self._settings))
            return tuple(dict.fromkeys((*there, *made)))
        if site not in self.seen:
            raise ReportingError(f"{self.title}: no site {site!r}; {nearest(site, [*self.seen, *self.unseen])}")
        return tuple(view for view in self.method.views if view != "personal" or self._has_own(site))

    @property
    def _settings(self) -> Evaluation:
        """What the run scored: a model that is fitted to images is made as it was there."""
        return self.run.experiment.evaluation

    def anew(self, view: str) -> bool:
        """Whether a view is fitted to every case by itself."""
        return per_case(view, self._settings)

    def _has_own(self, site: str) -> bool:
        """Whether a site has a personal model: one that never took part in a round has none."""
        return site in self.trained and bool(self._kept(site, "last").tensors)

    def choose(self, site: str | None, view: str | None) -> str:
        """The view to take: as asked, else the site's own model where there is one; without a site the global one.

        Raises:
            ReportingError: it does not exist; says which do.
        """
        there = self.views(site)
        if not there:
            cure = f"name one of its sites: {', '.join(self.seen)}" if self.method.views else "it pre-trains an encoder"
            why = f", since {self.method.none_elsewhere}" if self.method.none_elsewhere else ""
            raise ReportingError(f"{self.title} has no model for images of {site or 'a new site'}{why}; {cure}")
        away = (ADAPTED, *SERVED_ELSEWHERE) if site else (*SERVED_ELSEWHERE, ADAPTED)
        own = ("personal", "global") if site in self.seen else away
        wanted = view or next(name for name in own if name in there)
        if wanted not in there:
            whose = f"site {site!r}" if site else "a site that took no part (name one of the run's with --site)"
            told = self._no_statistics(site) if wanted == OWN_STATISTICS and self._serves_elsewhere() else ""
            raise ReportingError(
                f"{self.title}: {told or f'no {wanted} model for {whose}'}; there is: {', '.join(there)}"
            )
        return wanted

    def _serves_elsewhere(self) -> bool:
        """Whether the network is shared as a whole, or but for its statistics."""
        return bool({*SERVED_ELSEWHERE} & {*self.method.unseen_views})

    def _no_statistics(self, site: str | None) -> str:
        """Why statistics of images cannot take the place of the federation's, and what to do."""
        if site in self.seen:
            return f"site {site!r} took part: own statistics are for images from elsewhere, which need no --site"
        return (
            "its network keeps no running statistics that images could give anew; take the global model "
            "(predict.py --view global, export.py without --images)"
        )

    def round(self, view: str, site: str | None, chosen: Chosen) -> int:
        """After which round the model was saved."""
        return self._saved(view, site, chosen).round

    def load(
        self, view: str, site: str | None, chosen: Chosen = "best", images: Iterable[Tensor] | None = None
    ) -> Algorithm:
        """A worker whose `predict` and `network` answer for a view, on the run's device.

        Args:
            view: what `choose` returned.
            site: whose images; None for a place that took no part.
            chosen: the best saved model by validation score, or the last one.
            images: (B, C, h, w) in [0, 1], read again in every pass; needed by the views in `FITTED`.

        Raises:
            ReportingError: the view needs images.
            CheckpointError: a saved model is damaged or gone.
        """
        name, saved = site or NEW, self._saved(view, site, chosen)
        server = read_server(self.method, self.run.checkpoint, saved.server)
        kept = self._kept(name, chosen) if view == "personal" else State()
        round, seed = saved.round, self.run.experiment.config.seed
        worker = self._made(site if view == "personal" else None)
        for half in (self.method, worker):  # built without the file or the run that the weights came from
            half.take_frozen(server.get(FROZEN))
        message = self.method.broadcast(server, name, EvaluateTask(round, seed, views=(network_view(view),)))
        if view in FITTED and images is None:
            raise ReportingError(f"the {view} model is made from the images that it is for; there are none")
        if view == ADAPTED:
            message = State({**message.tensors, **self._published(worker, chosen).tensors}, message.scalars)
        seed_everything(derive_seed(seed, "evaluate", round, name))
        worker.receive(message, kept, NamedSite(name, seen=name in self.seen))
        worker.to(self.run.experiment.compute.device)
        if view == ADAPTED and images is not None:
            worker.adapt(images)
        elif view in FITTED and images is not None:
            fit_to(worker, view, worker.network(network_view(view)).eval(), images, self._settings)
        return worker

    def _saved(self, view: str, site: str | None, chosen: Chosen) -> Best:
        """Where the model lies."""
        name, checkpoint = f"personal/{site}" if view == "personal" else "global", self.run.checkpoint
        return checkpoint.last(name) if chosen == LAST else checkpoint.chosen(name)

    def _kept(self, site: str, chosen: Chosen) -> State:
        """What a site kept with its personal model."""
        file = self._saved("personal", site, chosen).kept
        method = self._made(site) if site in told(self.run.experiment.config) else self.method
        return read_kept(method, self.run.checkpoint, file) if file else State()

    def _made(self, site: str | None = None) -> Algorithm:
        """The method over the run's network, or over the one of a site.

        Raises:
            ReportingError: a setting of the run can no longer be used.
        """
        try:
            return self.run.experiment.algorithm(self.channels, trained=True, site=site)
        except (ValueError, FileNotFoundError) as error:
            raise ReportingError(
                f"{self.run.folder.config_path}: settings of this run can no longer be used: {error}"
            ) from error

    def _published(self, worker: Algorithm, chosen: Chosen) -> State:
        """What all sites give to one that never took part."""
        published = State()
        for name in self.seen:
            site = NamedSite(name)
            worker.receive(State(), self._kept(name, chosen), site)
            given = worker.publish(site)
            published.tensors |= {f"{group}/{name}": tensors for group, tensors in given.tensors.items()}
        return published


def _inputs(folder: RunFolder) -> tuple[int, list[str]]:
    """Channels of the network's input, and the types of the images' values."""
    inputs: object = folder.read_inputs()
    channels = inputs.get("channels") if isinstance(inputs, dict) else None
    if not isinstance(inputs, dict) or not isinstance(channels, int) or channels < 1:
        raise ReportingError(
            f"{folder.path}: inputs.json does not say how many channels the network takes; "
            f"train.py output={folder.path} resume=true writes it again"
        )
    values = inputs.get("values")
    return channels, [str(value) for value in values] if isinstance(values, list) else []
