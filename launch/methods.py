"""The tables of all methods, made from what the methods declare: `python -m fedseg.launch.methods FILE...`.

A document keeps its prose, and marks what is made:

    <!-- from methods: table -->
    (replaced)
    <!-- end -->

The word is one of

    table       every method and what it declares, beside what was measured
    refusals    why a method refuses what it refuses
    presets     the files of configs/algorithm
    together    what every method can be combined with, and why not with the rest
    short       names, papers, models, and what stays at the site
"""

from __future__ import annotations

import ast
import csv
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Literal

from fedseg.algorithms import ALGORITHMS, Algorithm
from fedseg.algorithms.composed import not_a_step, obstacle
from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.harmonised import harmonised
from fedseg.algorithms.recipe import Training
from fedseg.common.text import piped
from fedseg.configs.compose import FOLDER, ConfigError, compose
from fedseg.configs.help import first_line
from fedseg.configs.words import tree
from fedseg.federation.schedule import Schedule, check_method, without_effect
from fedseg.launch.command import guarded
from fedseg.launch.documents import Marks, make_anew
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA
from fedseg.models.select import NAMED
from fedseg.privacy.build import build_transforms
from fedseg.privacy.settings import Compression, Privacy
from fedseg.reporting import ReportingError

ROOT = Path(__file__).resolve().parent.parent
COSTS = ROOT / "docs" / "methods" / "costs.csv"
PAGES = ("docs/methods/README.md", "README.md")
MARKS = Marks("methods")
USUAL_GROUPS = ("model", "buffers")
PROTECTIONS = {
    "privacy of sites": Privacy(mechanism="site"),
    "privacy of patients": Privacy(mechanism="patient"),
    "secure aggregation": Privacy(aggregation="masked"),
}
HARMONISED: tuple[Literal["histogram", "combat", "mixstyle"], ...] = ("histogram", "combat", "mixstyle")
"""Ways of harmonising that differ in what they go together with; fda and zscore do as histogram does."""
ORDER: Literal["cyclic"] = "cyclic"
LOCAL_STEP = (
    *("loss", "training_step", "on_after_backward", "on_before_optimizer_step", "optimizer_step"),
    *("configure_gradient_clipping", "configure_optimizers", "batches", "learns"),
)
HELP = """python -m fedseg.launch.methods [FILE...] [check=true]

Makes the tables of all methods anew in Markdown files; without a file in docs/methods/README.md and README.md.

  check=true    change nothing; fail where a table is not what the methods declare
"""


@dataclass(frozen=True)
class Method:
    """What one method declares.

    Attributes:
        name: as in ``algorithm=NAME``.
        owner: its class.
        presets: files of configs/algorithm that depart from it under another name.
    """

    name: str
    owner: type[Algorithm]
    presets: tuple[str, ...] = ()

    @cached_property
    def built(self) -> Algorithm:
        """The method over a small network."""
        return _built(self.name)

    @property
    def family(self) -> str:
        """In what it differs from FedAvg first of all, by what it declares and overrides."""
        declared = {
            "baseline": "(baseline)" in first_line(self.owner),
            "the average": self.owner is FedAvg,
            "pre-training": not self.built.labelled,
            "images without labels": self.built.learns_unlabelled,
            "styles of images": self.owner.styles_images,
            "who merges": self.owner.among_peers,
            "what is exchanged": self.owner.exchanges_answers,
            "parts of the model stay": bool(self._personal),
            "a model of each site's own": "personal" in self.built.views,
            "weights of sites": self._overrides("weigh", "aggregate"),
            "local steps": self._overrides(*LOCAL_STEP),
            "the server's step": self._overrides("advance"),
        }
        return next((family for family, holds in declared.items() if holds), "another")

    def _overrides(self, *hooks: str) -> bool:
        usual = (Algorithm, FedAvg)
        return any(all(getattr(self.owner, hook) is not getattr(cls, hook) for cls in usual) for hook in hooks)

    @property
    def models(self) -> str:
        """Models at seen sites."""
        return ", ".join(self.built.views) or "an encoder, for `pretrained=RUN`"

    @property
    def stays(self) -> str:
        """What a site keeps from one turn to the next beside its data."""
        own = sorted({name.partition(".")[0].lstrip("_") for name in self.built.keep().get("own")})
        parts = [self._personal, *(f"`{name}`" for name in own)]
        return ", ".join(part for part in parts if part) or "-"

    @cached_property
    def _personal(self) -> str:
        """The tensors of the model that do not travel, in the words of `algorithm.personal`."""
        model = self.built.model
        stays = self.built.personal(model)
        names = (name for name, select in NAMED.items() if stays and stays == select(model))
        tops = (name for name, _ in model.named_children())
        whole = [top for top in tops if {key for key in model.state_dict() if key.startswith(f"{top}.")} <= stays]
        return next(names, ", ".join(whole) or (f"{len(stays)} tensors of the model" if stays else ""))

    @property
    def refusals(self) -> dict[str, str]:
        """What it cannot be combined with -> why."""
        found = {what: self._against(privacy) for what, privacy in PROTECTIONS.items()}
        found["volumes"] = self.owner.slices_only
        found["unseen sites"] = self.built.none_elsewhere
        found["ignored labels"] = (
            "" if self.built.leaves_out_unknown or not self.built.labelled else "its loss is its own"
        )
        found["pieces of a batch"] = "" if self.built.adds_up else "takes steps that are no sums over pieces"
        return {what: why for what, why in found.items() if why}

    def _against(self, privacy: Privacy) -> str:
        norms = ["model.norm=group"] if privacy.mechanism == "patient" else []
        try:
            algorithm = _built(self.name, *norms)
            for transform in build_transforms(privacy, Compression(), 1.0):
                transform.check(algorithm)
        except ValueError as error:
            reason = str(error).rpartition(", but ")[2].removeprefix(f"{self.owner.__name__} ")
            return reason.removeprefix("cannot: ")
        return ""

    @property
    def apart(self) -> dict[str, str]:
        """Another part or setting -> why it does not go together with it; empty where it does."""
        tried: dict[str, Callable[[], object]] = {
            "algorithm.personal=normalisation": self._with_personal,
            **{f"training.harmonise={kind}": partial(self._with_style, kind) for kind in HARMONISED},
            f"federation.order={ORDER}": self._in_turns,
        }
        found = {f"algorithm=METHOD+{step.name}": obstacle(self.owner, step.owner) for step in steps()}
        return found | {what: self._why(what, made) for what, made in tried.items()}

    def _in_turns(self) -> None:
        schedule = Schedule(order=ORDER)
        check_method(schedule, self.built)
        if told := without_effect(schedule, self.built):
            raise ValueError(told[0].replace(" on ", " has no effect on ", 1))

    def _with_personal(self) -> None:
        settings = {**self.built.hparams, "personal": "normalisation"}
        self.owner(self.built.model, self.built.recipe, **settings)

    def _with_style(self, kind: Literal["histogram", "combat", "mixstyle"]) -> None:
        harmonised(self.owner, Training(harmonise=kind))

    def _why(self, what: str, made: Callable[[], object]) -> str:
        """Why something is refused, in words that hold for others, too, and without the cure; empty if it is not."""
        try:
            made()
        except ValueError as error:
            told = str(error).partition("; ")[0].replace(self.owner.__name__, "the method")
            setting = what.partition("=")[0]
            return re.sub(rf"^{re.escape(setting)}(=\w+)?(: | )", lambda begin: "" if ":" in begin[2] else "it ", told)
        return ""

    @property
    def checked(self) -> str:
        """Against what it is compared in tests."""
        if self.name in golden_checked(ROOT / "tests"):
            return "arrays"
        if self.family == "baseline":
            return "-"
        return "the abstract" if "fter the abstract" in (self.owner.__doc__ or "") else "the paper"

    @cached_property
    def page(self) -> tuple[str, str]:
        """The page of docs/methods that explains it, and the section there; empty if none does."""
        named = re.compile(rf"^`algorithm=[^*]*?`(algorithm=)?{self.name}`", re.MULTILINE)
        first = re.compile(rf"^`algorithm={self.name}`", re.MULTILINE)
        for page in sorted((ROOT / "docs" / "methods").glob("*.md")):
            text = page.read_text(encoding="utf-8")
            if page.stem == self.name:
                return page.name, ""
            if found := first.search(text) or named.search(text):
                heading = re.findall(r"^#+ (.*)$", text[: found.start()], re.MULTILINE)[-1]
                return page.name, "" if text.count("\n## ", 0, found.start()) == 0 else slug(heading)
        return "", ""

    def linked(self, folder: str) -> str:
        """Its name with its presets, linked to its page from a document in a folder."""
        names = ", ".join(f"`{name}`" for name in (self.name, *self.presets))
        page, section = self.page
        return f"[{names}]({folder}{page}{section and f'#{section}'})" if page else names


@cache
def _built(name: str, *settings: str) -> Algorithm:
    config = compose([f"algorithm={name}", "data=phantom", "model=tiny", *settings], SCHEMA)
    return Experiment(config).declared


def slug(heading: str) -> str:
    """The anchor that a heading has on the web."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@cache
def golden_checked(tests: Path) -> frozenset[str]:
    """Methods that are compared with arrays of authors' code or formulas in tests/golden.

    An archive is named after its method, or a test file named after the method reads it, or a test that says so in its
    name is given the method.
    """
    archives = [path.stem for path in sorted((tests / "golden").glob("*.npz"))]
    found = {name for name in ALGORITHMS if any(archive.startswith(f"{name}_") for archive in archives)}
    for path in sorted(tests.glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        subject = path.stem.removeprefix("test_").removeprefix("functional_")
        if subject in ALGORITHMS and any(archive in text for archive in archives):
            found.add(subject)
        found |= set(_given_golden(ast.parse(text)))
    return frozenset(found)


def _given_golden(module: ast.Module) -> Iterator[str]:
    for function in module.body:
        if isinstance(function, ast.FunctionDef) and "golden" in function.name:
            constants = (node for mark in function.decorator_list for node in ast.walk(mark))
            yield from (str(n.value) for n in constants if isinstance(n, ast.Constant) and n.value in ALGORITHMS)


@cache
def methods() -> tuple[Method, ...]:
    """All of them, with their presets."""
    presets: dict[str, list[str]] = {}
    for path in sorted((FOLDER / "algorithm").glob("*.yaml")):
        name = str((tree(path.read_text(encoding="utf-8"), path.name) or {}).get("name", path.stem))
        if path.stem not in ALGORITHMS:
            presets.setdefault(name, []).append(path.stem)
    return tuple(Method(name, owner, tuple(presets.get(name, ()))) for name, owner in ALGORITHMS.items())


@cache
def steps() -> tuple[Method, ...]:
    """Those whose server step others can take."""
    return tuple(method for method in methods() if not not_a_step(method.owner))


@cache
def costs() -> dict[str, dict[str, str]]:
    """What was measured, by method; written by `python -m benchmarks.steps --write`."""
    lines = COSTS.read_text(encoding="utf-8").splitlines()
    return {row["method"]: row for row in csv.DictReader(line for line in lines if not line.startswith("#"))}


def _cost(method: Method) -> tuple[str, str, str, str, str]:
    """Groups that a site sends beside FedAvg's; step, bytes that travel, bytes kept, and memory against FedAvg's."""
    if method.name not in costs():
        return ("not measured",) * 5
    row, usual = costs()[method.name], costs()["fedavg"]
    sent = row["sends"].split()
    beside = [f"`{group}`" for group in sent if group not in USUAL_GROUPS]
    fewer = [group for group in USUAL_GROUPS if group not in sent]
    told = [f"tells {int(row['told']) / 1e3:.1f} kB before round 1"] if int(row["told"]) else []
    numbers = [f"the number `{name}`" for name in sorted(method.built.needed_numbers)]
    groups = ", ".join([*(["nothing"] if not sent else [f"no {g}" for g in fewer]), *beside, *numbers, *told]) or "-"
    travels = (int(row["up"]) + int(row["down"])) / (int(usual["up"]) + int(usual["down"]))
    memory = f"{int(row['memory']) / int(usual['memory']):.2f}" if row["memory"] else "not measured"
    kept = f"{int(row['kept']) / int(usual['up']):.2f}"
    step = " ".join([f"{float(row['step']):.1f}", *(f"(`{word}`)" for word in row["settings"].split())])
    return groups, step, f"{travels:.2f}", kept, memory


def table_text() -> str:
    """Every method in a row."""
    header = (
        *("`algorithm=`", "paper: idea", "differs in", "models at seen sites", "at unseen sites"),
        *("travels beside the model", "stays at a site", "learns from", "refuses"),
        *("step", "traffic", "kept", "memory", "compared with"),
    )
    rows = []
    for method in methods():
        groups, step, travels, kept, memory = _cost(method)
        unseen = ", ".join(method.built.unseen_views) or "-"
        learns = "masks" if method.built.labelled else "images"
        learns += ", images" if method.built.learns_unlabelled else ""
        rows.append(
            (
                *(method.linked(""), first_line(method.owner), method.family, method.models, unseen),
                *(groups, method.stays, learns, ", ".join(method.refusals) or "-"),
                *(step, travels, kept, memory, method.checked),
            )
        )
    return markdown(header, rows)


def refusals_text() -> str:
    """What stands behind the column of refusals, each reason once."""
    users: dict[tuple[str, str], list[str]] = {}
    for method in methods():
        for what, why in method.refusals.items():
            users.setdefault((what, why), []).append(f"`{method.name}`")
    kinds = dict.fromkeys(what for what, _ in users)
    rows = [(what, why, ", ".join(names)) for kind in kinds for (what, why), names in users.items() if what == kind]
    return markdown(("refused", "why", "methods"), rows)


def together_text() -> str:
    """What goes together with which methods, then each reason why something does not."""
    users: dict[tuple[str, str], list[str]] = {}
    for method in methods():
        for what, why in method.apart.items():
            users.setdefault((what, why), []).append(f"`{method.name}`")
    alike: dict[tuple[str, str], list[str]] = {}
    kinds = list(dict.fromkeys(what for what, _ in users))
    for (what, why), names in sorted(users.items(), key=lambda item: (bool(item[0][1]), kinds.index(item[0][0]))):
        alike.setdefault((why, ", ".join(names)), []).append(f"`{what}`")
    rows = [(", ".join(whats), why or "goes together", names) for (why, names), whats in alike.items()]
    return markdown(("with", "", "methods"), rows)


def presets_text() -> str:
    """Presets and the first line of their files."""
    lines = []
    for path in sorted((FOLDER / "algorithm").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        lines.append(f"* `{path.stem}`: {first.removeprefix('# ')}\n")
    return "".join(lines)


def short_text() -> str:
    """What README shows of the table."""
    rows = [(m.linked("docs/methods/"), first_line(m.owner), m.models, m.stays) for m in methods()]
    return markdown(("`algorithm=`", "method", "models it yields", "stays at a site beside data"), rows)


TEXTS: dict[str, Callable[[], str]] = {
    "table": table_text,
    "refusals": refusals_text,
    "presets": presets_text,
    "short": short_text,
    "together": together_text,
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "".join(f"{piped(cells)}\n" for cells in (header, ["---"] * len(header), *rows))


def rewritten(text: str, document: Path) -> str:
    """The document with its tables made anew.

    Raises:
        ReportingError: a mark that cannot be read, or none.
    """
    marks = MARKS.specs(text, document)
    if not marks:
        raise ReportingError(f"{document} has no table of methods; mark its place: {MARKS.at('table')} <!-- end -->")
    if strange := [what for what in marks if what not in TEXTS]:
        raise ReportingError(f"{document}: {strange[0]!r} is no table of methods; there are {', '.join(TEXTS)}")
    return MARKS.rewritten(text, lambda what: TEXTS[what]())


def run(arguments: Sequence[str]) -> int:
    """Rewrite or check documents."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    told = [argument for argument in arguments if argument in ("check=true", "check=false")]
    documents = [Path(argument) for argument in arguments if argument not in told]
    if strange := [path for path in documents if path.suffix != ".md"]:
        raise ConfigError(f"{strange[0]} is neither a Markdown file nor check=true; see --help")
    check = "check=true" in told
    for document in documents or [Path(os.path.relpath(ROOT / page)) for page in PAGES]:
        make_anew(document, rewritten, check, told="the methods declare", command="fedseg.launch.methods")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded(run, arguments)


if __name__ == "__main__":
    sys.exit(main())
