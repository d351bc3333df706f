"""The template of every method: a LightningModule that carries a client half and a server half."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedseg.algorithms.functional.pieces import in_pieces
from fedseg.algorithms.functional.private import PrivateStep
from fedseg.algorithms.optimizer_state import load_optimizer, pack_optimizer
from fedseg.algorithms.parts import FROZEN, Parts, copies, mark, without
from fedseg.algorithms.recipe import Recipe
from fedseg.algorithms.stock import LAST, StockModule, View, dice
from fedseg.federation.contract import LOSS, Average, Batch, Cohort, MessageError, Site, Split, Task
from fedseg.federation.ranges import ReadBy, check_ranges
from fedseg.federation.state import State, Tensors, Update, add, subtract, without_sites
from fedseg.models.heads import decide
from fedseg.models.select import Selector, everything, named, nothing
from fedseg.models.volumes import auxiliary_heads

SAID_BY = {"aggregate": "reads_updates", "introduce": "introduces", "personalise": "personalises", "adapt": "adapts"}
"""Hooks, and what a method that writes one thereby declares."""
FOUNDERS = "what its sites tell before round 1 is agreed on then, and it does not say what becomes of a newcomer's"
OTHERS_FROZEN = (
    "the tensors of the network that do not learn (model.freeze_encoder=true, model.lora_rank) differ from those at "
    "the server; take the same file of weights (model.encoder_weights) on all machines: random ones may differ from "
    "one to another"
)


class Algorithm(StockModule):
    """Federated averaging of `self.model`, as a template.

    `self.model` travels, unless `personal` names its tensors. Anything else a method hangs on itself stays at the
    site and is kept there: a second model, a control variate, a trajectory. Subclasses say only what is new.

    Args:
        model: the network; its `state_dict` is what methods speak about.
        recipe: normalisation, loss and optimiser.
        personal: tensors of the model that stay at each site, instead of the method's own choice: normalisation,
            statistics, lora (adapters), or part:segmentation_head and the like. Null leaves the method's choice.
    """

    personal: Selector = staticmethod(nothing)
    """Which tensors of the model stay at the site."""
    views: tuple[View, ...] = ("global",)
    """Which models can be evaluated at a seen site."""
    unseen_views: tuple[View, ...] = ("global",)
    """Which models serve a site that never took part; none where nothing is shared as a whole. Of a method that shares
    all but running statistics it is the shared network with those of the site's own images: own-statistics."""
    per_site: frozenset[str] = frozenset()
    """Groups that the server files per site instead of averaging; peers or the server see them singly."""
    one_column_per_site: frozenset[str] = frozenset()
    """Shared parameters whose width is the number of sites, which a fresh model does not know."""
    uniform_groups: frozenset[str] = frozenset()
    """Groups in whose mean every update counts the same, as of sites, whatever the updates weigh otherwise."""
    exact_groups: frozenset[str] = frozenset()
    """Groups that the next state is computed from: clipped, noised or thinned out they would mean nothing."""
    needed_numbers: frozenset[str] = frozenset()
    """Numbers that every update must tell, because the server half computes with them."""
    reads_updates: bool = False
    """Whether the updates of a round are compared; such a method excludes secure aggregation. True for a class that
    writes `aggregate`; one whose `weigh` compares them says so."""
    answers_singly: bool = False
    """Whether `broadcast` answers every site with a model of its own instead of the mean."""
    read_by: ClassVar[ReadBy] = {}
    """Settings that only some choices of another one read: with others a method refuses them (`check_read`), and tuning
    leaves them as they are."""
    steady_weights: bool = False
    """Whether means are added up over rounds, in which a site has to weigh the same."""
    among_peers: bool = False
    """Whether sites take each other's models in turn, and nothing goes to a server: only what is taken is traffic."""
    fewest_sites: int = 1
    """Sites that must be there in every round, where each learns from what others tell."""
    exchanges_answers: bool = False
    """Whether sites send what their networks answer about public images (`Recipe.public`), and no tensor of these."""
    introduces: bool = False
    """Whether the server is told something of the site's data, which peers or the server then see singly. True for a
    class that writes `introduce`."""
    trains_on: Literal["sites", "pool"] = "sites"
    """Whether every site trains, or one place that holds all training data."""
    splits_itself: bool = False
    """Whether what stays at a site is the method's whole point, so that the setting `personal` has no meaning."""
    personalises: bool = False
    """Whether a model is fitted that exists only for evaluation at the site. True for a class that writes
    `personalise`."""
    labelled: bool = True
    """Whether it learns from masks. A pre-training stage does not: it has no views, and sites without labels train."""
    learns_unlabelled: bool = False
    """Whether it learns from images without labels, too, beside those with: sites without any label train."""
    models_per_step: int = 1
    """How many models a local step trains: a step of each is counted as cost."""
    compares_patients: bool = False
    """Whether `loss` compares images of different patients: such a step cannot be made private patient by patient."""
    _settings: Mapping[str, Any] = {}  # as the constructor was given them
    leaves_out_unknown: bool = True
    """Whether `loss` leaves out the pixels whose label is not known (``batch["known"]``). It is False for a class that
    writes its own `loss` and does not say so: such a method refuses data with ignored labels."""
    teaches_unannotated: bool = False
    """Whether all that it adds is for regions that a site did not annotate: a run without any says so."""
    adds_nothing: str = ""
    """Why what it adds has no effect on this network, or in so few rounds, and the cure; empty where it has one. A run
    says so."""
    adds_up: bool = True
    """Whether a step's loss is a mean over images, beside terms without any, so that a batch may be computed in pieces.
    It is False for a class that writes its own loss or step and does not say so: it refuses `training.pieces`."""
    styles_images: bool = False
    """Whether it gives images styles of its own, which harmonising them would take away again."""
    prepares: str = ""
    """What its `preparation` does to images before `training.normalize`, as a card says it; empty if nothing."""
    prepares_by_site: bool = False
    """Whether it does so by what is known of the site that an image is from, as no other site's message tells."""
    slices_only: str = ""
    """Why it cannot learn from volumes (data.dimensions=3); empty where it can."""
    one_answer: str = ""
    """Why it cannot train networks with auxiliary heads (model.deep_supervision); empty where it reads what a network
    answers through `task_loss` alone."""
    over_rounds: str = ""
    """What goes over the run's rounds, so that a run of more rounds is another one from its beginning; empty if
    nothing does. Learning rates say so themselves."""
    adapts: bool = False
    """Whether sites `publish` a model after training, and a site that never took part can `adapt` these to itself. True
    for a class that writes `adapt`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """What follows from a hook is so; a loss is trusted with unknown labels and pieces of a batch if it says so."""
        super().__init_subclass__(**kwargs)
        for hook, flag in SAID_BY.items():
            if getattr(cls, hook) is not getattr(Algorithm, hook):
                setattr(cls, flag, True)
        if "loss" in vars(cls) and "leaves_out_unknown" not in vars(cls):
            cls.leaves_out_unknown = False
        if {"loss", "training_step", "optimizer_step"} & vars(cls).keys() and "adds_up" not in vars(cls):
            cls.adds_up = False

    def __new__(cls, *_: Any, **settings: Any) -> Algorithm:
        """Refuse settings outside the ranges that the constructors' annotations state."""
        for parent in cls.__mro__:
            if "__init__" in vars(parent):
                check_ranges(vars(parent)["__init__"], settings, "algorithm")
        made = super().__new__(cls)
        made._settings = {key: value for key, value in settings.items() if key not in ("model", "recipe")}
        return made

    def __init__(self, model: nn.Module, recipe: Recipe, *, personal: str | None = None) -> None:
        super().__init__()
        if recipe.training.pieces > 1 and not self.adds_up:
            raise ValueError(
                f"training.pieces={recipe.training.pieces}: a step of {type(self).__name__} is no sum over pieces of "
                "its batch; take training.pieces=1, and a smaller data.batch_size where memory is short"
            )
        self._check_answers(auxiliary_heads(model))
        if recipe.training.channels_last:
            axes = max((p.ndim for p in model.parameters()), default=0)
            model = model.to(memory_format=LAST.get(axes, torch.channels_last))
        self.model = model
        self.recipe = recipe
        if personal is not None:
            if self.splits_itself:
                raise ValueError(f"algorithm.personal has no meaning for {type(self).__name__}; leave it null")
            self.personal = named(personal)
        self.parts = Parts(model, self.personal, trains=self.labelled)
        if self.personal is not nothing and self.views:
            whole = "global" in self.unseen_views and not self.parts.learnt
            self.views = tuple(view for view in self.views if view != "global") or ("personal",)
            self.unseen_views, self.adapts = ("own-statistics",) if whole else (), False
        self.save_hyperparameters(self._settings)
        self._frozen_mark = mark(self.frozen) if self.parts.frozen else None
        self._copies: dict[str, str] = {}  # tensors of second models that never change: their name in the model
        self._trainable = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        self._pristine: State | None = None
        self._optimizer_state: Tensors = {}
        self._focus: Selector | None = None
        self._reference: Tensors | None = None
        self._losses: dict[str, list[Tensor]] = {}  # of the steps of this turn, by the name they are told under
        self._noises: dict[float, int] = {}  # of the private steps of this turn
        self.received = State()
        self.turn_site: Site | None = None  # where the turn at hand is; None in a fit without a federation
        self.round = 0  # of the training task at hand; 0 elsewhere
        self.trained_here = False  # whether the site that the worker stands for has kept anything from training

    def _check_answers(self, heads: int) -> None:
        """Refuse auxiliary heads where somebody else than `task_loss` reads answers, or may do so."""
        own = "" if self.leaves_out_unknown else "its own loss may read what the network answers (leaves_out_unknown)"
        if heads and (why := self.one_answer or own):
            raise ValueError(
                f"model.deep_supervision={heads}: {type(self).__name__} trains networks of one answer only: {why}; "
                "take model.deep_supervision=0"
            )

    @property
    def shares(self) -> bool:
        """Whether any tensor of the model is averaged."""
        return bool(self.parts.parameters or self.parts.buffers)

    @property
    def frozen(self) -> Tensors:
        """The model's tensors that never change."""
        state = self.model.state_dict()
        return {name: state[name] for name in self.parts.frozen}

    @property
    def none_elsewhere(self) -> str:
        """Why no model serves a site that never took part; empty where one does, and where nothing segments yet."""
        if self.unseen_views or not self.views:
            return ""
        if not (self.parts.parameters or self.parts.buffers):
            return "no tensor of its network is averaged"
        names = ", ".join(dict.fromkeys(name.partition(".")[0] for name in self.parts.learnt))
        return f"weights in {names} stay at the sites" if names else "what is averaged is none of its models"

    @property
    def mixes_patients(self) -> str:
        """Why a local step cannot be made private patient by patient; empty when it can.

        What leaves the site must have learnt from patients' clipped gradients alone, and a patient's must not depend
        on other patients.
        """
        if self.compares_patients:
            return "its loss compares images of different patients (compares_patients)"
        for so, flag in ((not self.labelled, "labelled"), (self.learns_unlabelled, "learns_unlabelled")):
            if so:
                return f"it learns from images without labels, which are not drawn by patient ({flag})"
        beside = [name for name, p in self.named_parameters() if p.requires_grad and not name.startswith("model.")]
        if beside:
            return f"it trains a second model in the same step ({beside[0]} and {len(beside) - 1} others)"
        batch_norms = [name for name, module in self.model.named_modules() if isinstance(module, _BatchNorm)]
        if batch_norms:
            return f"the network normalises over batches ({batch_norms[0]}); take model.norm=group"
        if self.parts.buffers:
            return f"the network's running statistics travel ({self.parts.buffers[0]}); take model.norm=group"
        return ""

    # ---------------------------------------------------------------- what a method usually overrides

    def loss(self, batch: Batch) -> Tensor:
        """The objective of one local step."""
        return self.criterion(self.model, batch)

    def learns(self, step: int) -> Selector:
        """Which tensors of the model learn in a local step; the others are frozen, momentum included."""
        return everything

    def network(self, view: View) -> nn.Module:
        """The network that answers for a view: normalised images -> logits."""
        return self.model

    def standalone(self, view: View) -> nn.Module:
        """That network as a module which holds everything it needs, to be saved or traced as a whole."""
        return self.network(view)

    def answers_with(self) -> State:
        """What came beside the model's own tensors and is needed to answer, such as heads of other sites."""
        return State()

    def probe(self, site: Site, split: Split) -> dict[str, float]:
        """What the method says of itself at a site without any label, name -> value; nothing is changed."""
        return {}

    # ---------------------------------------------------------------- client half

    def check_site(self, site: Site) -> None:
        """Refuse data that the method cannot serve, before anything runs.

        Raises:
            ValueError: with the site's name and the cure.
        """

    def examples_at(self, site: Site) -> int:
        """Training images by which the site counts in a mean: labelled ones, or all where it learns from none."""
        return site.examples if self.labelled else site.training_images

    def introduce(self, site: Site) -> State:
        """What the site tells the server once, before its first round: nothing, unless a method needs it."""
        return State()

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load the shared tensors that came and what this site kept (its first time: what everybody starts from).

        Raises:
            MessageError: what never changes is not the same here as where the message comes from.
        """
        if message.scalars.get(FROZEN, self._frozen_mark) != self._frozen_mark:
            raise MessageError(OTHERS_FROZEN)
        if self._pristine is None:
            self._copies = copies(self, self.model, self.parts.frozen)
            self._pristine = self.keep().clone()
        self.received, self.turn_site = message, site
        self._reference = None
        self._losses, self._noises = {}, {}
        self._freeze_all_but(everything)
        self.trained_here = bool(kept.tensors)
        stays = kept if self.trained_here else self._pristine
        self._optimizer_state = stays.get("optimizer")
        self._load(self.model, {**stays.get("model"), **message.get("model"), **message.get("buffers")})
        frozen = self.frozen
        self._load(self, {**{copy: frozen[name] for copy, name in self._copies.items()}, **stays.get("own")})

    def take_frozen(self, tensors: Tensors) -> None:
        """Take what never changes from a saved run, for a worker that was built without the weights it began with."""
        twins = copies(self, self.model, self.parts.frozen)
        self._load(self.model, tensors)
        self._load(self, {copy: tensors[name] for copy, name in twins.items() if name in tensors})
        self._frozen_mark = mark(self.frozen) if self.parts.frozen else None

    def batches(self, site: Site, seed: int, steps: int) -> Iterable[Batch]:
        """The images of one local fit: labelled and augmented, whole patients drawn by chance if steps are private."""
        private = self.recipe.private
        return site.train_batches(seed, steps) if private is None else private.batches(site, seed, steps)

    def personalise(self, site: Site, fit: Callable[[int], None]) -> None:
        """Fit a personal model before it is evaluated (only asked of methods that write it)."""

    def publish(self, site: Site) -> State:
        """What the site gives to sites that never took part (only asked of methods that write `adapt`)."""
        return State()

    def adapt(self, images: Iterable[Tensor]) -> None:
        """Fit a model for an unseen site from its images (only asked of methods that write it)."""

    def send(self, site: Site) -> State:
        """The differences of all shared tensors, and the mean loss.

        Raises:
            RuntimeError: what never changes has changed.
        """
        state = self.model.state_dict()
        if self.parts.frozen and mark(self.frozen) != self._frozen_mark:
            raise RuntimeError(
                f"parameters of {type(self.model).__name__} that do not learn have changed in a local fit; they would "
                "neither travel nor be kept. What is computed otherwise than by gradients belongs in buffers"
            )
        answer = State()
        for group, names in (("model", self.parts.parameters), ("buffers", self.parts.buffers)):
            if names:
                trained = {name: state[name].detach().cpu() for name in names}
                answer.tensors[group] = subtract(trained, self.received[group])
        if self.recipe.private is not None:
            answer.scalars |= self.recipe.private.told(site.patients, self._noises)
        answer.scalars |= {name: float(torch.stack(losses).mean()) for name, losses in self._losses.items()}
        return answer

    def keep(self) -> State:
        """Personal tensors of the model, everything else that hangs on the method, and optimiser state if declared.

        Not what never changes, in second models neither.
        """
        state, whole = self.model.state_dict(), self.state_dict()
        same = {copy for copy, name in self._copies.items() if torch.equal(whole[copy], state[name])}
        own = {name: t for name, t in whole.items() if not name.startswith("model.") and name not in same}
        kept = State({"model": {name: state[name] for name in self.parts.stays}, "own": own})
        if self._optimizer_state:
            kept.tensors["optimizer"] = self._optimizer_state
        return State({g: {k: t.detach().cpu().clone() for k, t in ts.items()} for g, ts in kept.tensors.items() if ts})

    # ---------------------------------------------------------------- server half: State and Update only

    @property
    def founders_only(self) -> str:
        """Why no site can join after round 1; empty where one can. A class that writes `introduce` says so itself."""
        writers = (kind for kind in type(self).__mro__ if kind is not Algorithm and "introduce" in vars(kind))
        return "" if all("founders_only" in vars(kind) for kind in writers) else FOUNDERS

    def regrouped(self, server: State, arrived: Mapping[str, State], left: Collection[str]) -> State:
        """Sites have come, who start from the shared tensors, or left: nothing is held in their names any more."""
        return without_sites(server, left)

    def init_server(self, introductions: Mapping[str, State]) -> State:
        """The shared tensors of the freshly built model, and what never changes."""
        state = self.model.state_dict()
        groups = {"model": self.parts.parameters, "buffers": self.parts.buffers, FROZEN: self.parts.frozen}
        return State({g: {n: state[n].detach().cpu().clone() for n in names} for g, names in groups.items() if names})

    def restored(self, server: State) -> State:
        """A saved state of the server; earlier versions filed what never changes with the rest."""
        names = frozenset(self.parts.frozen)
        if not names or FROZEN in server.tensors:
            return server
        found = {n: t for group in ("model", "buffers") for n, t in server.get(group).items() if n in names}
        rest = without(server, names)
        return State({**rest.tensors, FROZEN: found}, rest.scalars)

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """The shared tensors, the same for every site, and the mark of what never changes."""
        shared: dict[str, Tensors] = {g: server[g] for g in ("model", "buffers") if g in server.tensors}
        return State(shared, {} if self._frozen_mark is None else {FROZEN: self._frozen_mark})

    def weigh(self, server: State, updates: Sequence[Update]) -> list[float]:
        """By number of labelled training images."""
        return [float(update.examples) for update in updates]

    def aggregate(self, server: State, updates: Sequence[Update], average: Average) -> State:
        """Weigh all updates of a round side by side (only asked of methods with `reads_updates`)."""
        return self.advance(server, *average(self.weigh(server, updates)))

    def advance(self, server: State, mean: State, cohort: Cohort) -> State:
        """Add the mean difference to the shared tensors; other groups of the mean replace the server's."""
        moved: dict[str, Tensors] = {
            group: add(server[group], mean[group]) for group in ("model", "buffers") if group in mean.tensors
        }
        for name in self.parts.variances & moved.get("buffers", {}).keys():
            moved["buffers"][name].clamp_(min=0.0)  # noise on their mean may take them below
        others = {group: ts for group, ts in mean.tensors.items() if group not in moved}
        return State({**server.tensors, **others, **moved}, server.scalars)

    # ---------------------------------------------------------------- tools for methods

    def note(self, loss: Tensor, name: str = LOSS) -> None:
        """Report a loss of the step at hand; a step of several models notes each by itself, not their sum."""
        self._losses.setdefault(name, []).append(loss.detach())

    def criterion(self, network: nn.Module, batch: Batch) -> Tensor:
        """The recipe's loss of a network on a batch, over the pixels whose label is known."""
        return self.task_loss(network(self.normalize(batch["image"])), batch)

    @property
    def preparation(self) -> nn.Module:
        """What happens to images in [0, 1] before the network, as a module without entries in `state_dict()`."""
        return self.recipe.normalize

    @property
    def reference(self) -> Tensors:
        """The shared parameters as received in this turn, on the model's device."""
        if self._reference is None:
            self._reference = {name: t.to(self.device) for name, t in self.received.get("model").items()}
        return self._reference

    def mean_dice(self, network: nn.Module, batches: Iterable[Batch]) -> float | None:
        """Mean Dice of a network over the images and regions in which there is anything; None where that is nothing."""
        scores = []
        for batch in batches:
            found = self.answers(network, batch["image"].to(self.device))
            scores.append(dice(decide(found, self.recipe.activation).cpu(), batch["mask"], batch.get("known")))
        defined = torch.cat(scores) if scores else torch.zeros(0)
        return float(defined.mean()) if len(defined) else None

    # ---------------------------------------------------------------- Lightning

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One local step."""
        self._freeze_all_but(self.learns(batch_idx))
        if self.recipe.private is not None:
            return self._private_objective(self.recipe.private, batch)
        told = len(self._losses.get(LOSS, ()))
        objective, loss = self.descended(self.loss, batch)
        if len(self._losses.get(LOSS, ())) == told:
            self.note(loss)
        return objective

    def _private_objective(self, private: PrivateStep, batch: Batch) -> Tensor:
        learning = [p for p in self.parameters() if p.requires_grad]
        rate = self.recipe.training.lr_in(self.round, self.recipe.rounds)
        step = private.settled(partial(self.criterion, self.model), batch, learning, rate)
        self._noises[step.noise] = self._noises.get(step.noise, 0) + 1
        return step.objective(self.loss, batch, learning, rate)

    def descended(self, loss: Callable[[Batch], Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """What a step descends, in pieces if the recipe says so, and the loss that it stands for."""
        if (pieces := self.recipe.training.pieces) > 1:
            return in_pieces(loss, batch, pieces, [p for p in self.parameters() if p.requires_grad])
        whole = loss(batch)
        return whole, whole

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's optimiser over all that can learn; its state is fresh or, if so declared, the site's own."""
        learning = {name: p for name, p in self.named_parameters() if p.requires_grad}
        training = self.recipe.training
        optimizer = training.build_optimizer(learning.values(), training.lr_in(self.round, self.recipe.rounds))
        if self._optimizer_state:
            load_optimizer(optimizer, list(learning), self._optimizer_state)
        return optimizer

    def on_train_end(self) -> None:
        """Thaw everything, and take the optimiser's state along if it is to be kept."""
        self._freeze_all_but(everything)
        if self.recipe.training.optimizer_state == "keep":
            optimizer = self.optimizers(use_pl_optimizer=False)
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(f"{type(self).__name__} trains with one optimiser, found {optimizer}")
            names = [name for name, p in self.named_parameters() if p.requires_grad]
            self._optimizer_state = pack_optimizer(optimizer, names)

    # ---------------------------------------------------------------- inside

    def _freeze_all_but(self, selector: Selector) -> None:
        if selector is self._focus:
            return
        self._focus = selector
        names = selector(self.model) & self._trainable
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in names)

    @staticmethod
    @torch.no_grad()
    def _load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        state = module.state_dict()
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
