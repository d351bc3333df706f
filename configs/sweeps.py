"""Sweep files: what `wandb sweep` reads, read for running the same combinations of settings without W&B."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from fedseg.configs.compose import FOLDER, ConfigError
from fedseg.configs.knobs import unknown
from fedseg.configs.words import ambiguous

Parameter = Mapping[str, Any]
Combination = dict[str, Any]
ARGUMENTS = "${args_no_hyphens}"
MACROS = ("${env}", "${interpreter}", "${program}", ARGUMENTS)
KEYS = (
    *("program", "name", "description", "project", "entity", "method", "metric", "parameters", "command"),
    *("early_terminate", "run_cap"),
)
GOALS = ("minimize", "maximize")
LONGEST_NAME = 100
MOST_RUNS = 10_000
LARGEST = 1e300
HIGHEST_POWER = 690.0  # of e, below LARGEST


@dataclass(frozen=True)
class Sweep:
    """A sweep file.

    Attributes:
        name: of the sweep.
        method: grid, random or bayes.
        parameters: setting -> its value, values or distribution.
        metric: the name that is optimised; empty if none.
        maximize: whether more is better.
        before: settings that every run gets besides: the words of `command` before the parameters.
        after: those after them; the later word counts, so they win over parameters.
        early_terminate: whether W&B would end hopeless runs early.
        run_cap: the most runs; None if there is no limit.
    """

    name: str
    method: str
    parameters: Mapping[str, Parameter]
    metric: str = ""
    maximize: bool = True
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    early_terminate: bool = False
    run_cap: int | None = None

    @property
    def varying(self) -> tuple[str, ...]:
        """The parameters with more than one value."""
        return tuple(k for k, p in self.parameters.items() if "value" not in p and len(p.get("values", (0, 0))) > 1)

    @classmethod
    def read(cls, source: str) -> Sweep:
        """Read a file.

        Args:
            source: path of a YAML file, or NAME for configs/sweep/NAME.yaml.

        Raises:
            ConfigError: there is no such file, or it says something that cannot be run.
        """
        path = Path(source) if source.endswith((".yaml", ".yml")) else FOLDER / "sweep" / f"{source}.yaml"
        if not path.is_file():
            known = [file.stem for file in (FOLDER / "sweep").glob("*.yaml")]
            raise ConfigError(unknown(source, known, "sweep") + " (or give the path of a YAML file)")
        try:
            text = path.read_text(encoding="utf-8")
            _check_words(text)
            content = yaml.safe_load(text)  # as W&B reads it; ${env} is no interpolation
            return cls._parsed(content, path)
        except (ConfigError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def _parsed(cls, content: Any, path: Path) -> Sweep:
        if not isinstance(content, Mapping):
            raise ConfigError("this is no sweep: it should hold program, method, parameters and command")
        strange = [key for key in content if key not in KEYS]
        if strange:
            raise ConfigError(unknown(str(strange[0]), KEYS))
        if content.get("program") != "train.py":
            raise ConfigError(f"program={content.get('program')}; only train.py is run here")
        if content.get("method") not in ("grid", "random", "bayes"):
            raise ConfigError(f"method={content.get('method')} should be grid, random or bayes")
        parameters = content.get("parameters")
        if not isinstance(parameters, Mapping) or not parameters:
            raise ConfigError("parameters: there are none")
        for name, parameter in parameters.items():
            _check(str(name), parameter, grid=content["method"] == "grid")
        run_cap = content.get("run_cap")
        if run_cap is not None and (type(run_cap) is not int or run_cap < 1):
            raise ConfigError(f"run_cap={run_cap!r} should be a whole number, at least 1")
        metric, maximize = _metric(content.get("metric"))
        before, after = _words(content.get("command"))
        later = {_key(word) for word in after}
        return cls(
            name=str(content.get("name") or path.stem),
            method=content["method"],
            parameters={str(name): parameter for name, parameter in parameters.items() if name not in later},
            metric=metric,
            maximize=maximize,
            before=before,
            after=after,
            early_terminate="early_terminate" in content,
            run_cap=run_cap,
        )

    def fixed(self, settings: Mapping[str, str]) -> Sweep:
        """The sweep with some settings given by hand: they are no longer varied."""
        parameters = {key: value for key, value in self.parameters.items() if key not in settings}
        before = tuple(word for word in self.before if _key(word) not in settings)
        after = tuple(word for word in self.after if _key(word) not in settings)
        return replace(self, parameters=parameters, before=before, after=(*after, *arguments(settings)))

    def settings(self, combination: Combination) -> list[str]:
        """All `key=value` of a run, in the order in which `wandb agent` writes them."""
        return [*self.before, *arguments(combination), *self.after]

    def combinations(self, count: int | None, seed: int) -> list[Combination]:
        """Setting -> value, for each run.

        Args:
            count: how many; if it is None, as many as `run_cap` says, or all of a grid. The first ones of a larger
                count are those of a smaller one.
            seed: of the draws, where there are any.

        Raises:
            ConfigError: a sweep that draws needs a count; it is above `run_cap`.
        """
        if count is None:
            count = self.run_cap
        elif self.run_cap is not None and count > self.run_cap:
            raise ConfigError(f"count={count} is above run_cap={self.run_cap} of the sweep file; change one of them")
        if self.method == "grid":
            return self._grid(count)
        if count is None:
            raise ConfigError(f"method={self.method} draws settings; say how many runs with count=N, or with run_cap")
        _check_number(count)
        found: list[Combination] = []
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            found.append({key: draw(parameter, rng) for key, parameter in self.parameters.items()})
        return found

    def _grid(self, count: int | None) -> list[Combination]:
        """The first combinations, counted before any is listed; the last parameter varies fastest."""
        sizes = {key: counted(parameter) or 0 for key, parameter in self.parameters.items()}
        wanted = math.prod(sizes.values()) if count is None else min(count, math.prod(sizes.values()))
        _check_number(wanted)
        found = []
        for number in range(wanted):
            combination: Combination = {}
            for key in reversed(list(self.parameters)):
                number, place = divmod(number, sizes[key])
                combination[key] = nth(self.parameters[key], place)
            found.append({key: combination[key] for key in self.parameters})
        return found

    def run_name(self, combination: Combination) -> str:
        """A name for one run's folder, made of the settings that vary; another one for every combination."""
        last = [key.rpartition(".")[2] for key in self.varying]
        short = [leaf if last.count(leaf) == 1 else key for key, leaf in zip(self.varying, last, strict=True)]
        values = [(name, combination[key]) for name, key in zip(short, self.varying, strict=True)]
        exact = ",".join(f"{name}={_exact(value)}" for name, value in values) or "run"
        plain = ",".join(f"{name}={_short(value)}" for name, value in values) or "run"
        name = re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", plain)
        if name == exact and len(name) <= LONGEST_NAME:
            return name
        digest = sha256(exact.encode()).hexdigest()[:8]  # different settings may look alike now
        return f"{name[: LONGEST_NAME - 9]}-{digest}"


def arguments(combination: Mapping[str, Any]) -> list[str]:
    """`key=value` as `wandb agent` writes them for ${args_no_hyphens}."""
    return [f"{key}={value}" for key, value in combination.items()]


def counted(parameter: Parameter) -> int | None:
    """How many values a parameter has; None if it is drawn from a distribution."""
    if "value" in parameter:
        return 1
    if "values" in parameter:
        return len(tuple(parameter["values"]))
    if _distribution(parameter) in ("int_uniform", "q_uniform"):
        return int((parameter["max"] - parameter["min"]) / parameter.get("q", 1) + 1e-9) + 1
    return None


def nth(parameter: Parameter, place: int) -> Any:
    """One of the values that are counted, from 0."""
    if "value" in parameter:
        return parameter["value"]
    if "values" in parameter:
        return parameter["values"][place]
    return _even(parameter["min"] + parameter.get("q", 1) * place)


def listed(parameter: Parameter) -> tuple[Any, ...] | None:
    """All values of a parameter; None if it is drawn from a distribution."""
    count = counted(parameter)
    return None if count is None else tuple(nth(parameter, place) for place in range(count))


def draw(parameter: Parameter, rng: random.Random) -> Any:
    """One value, drawn as W&B's random search does."""
    if "value" in parameter or "values" in parameter:
        values = listed(parameter) or ()
        return rng.choices(values, parameter.get("probabilities"))[0]
    return DISTRIBUTIONS[_distribution(parameter)](parameter, rng)


def _uniform(p: Parameter, rng: random.Random) -> float:
    return rng.uniform(p["min"], p["max"])


def _log_uniform_values(p: Parameter, rng: random.Random) -> float:
    return math.exp(rng.uniform(math.log(p["min"]), math.log(p["max"])))


def _normal(p: Parameter, rng: random.Random) -> float:
    return rng.gauss(p.get("mu", 0.0), p.get("sigma", 1.0))


def _stepped(draws: Callable[[Parameter, random.Random], float]) -> Callable[[Parameter, random.Random], float]:
    """Rounded to multiples of q."""

    def stepped(p: Parameter, rng: random.Random) -> float:
        step = p.get("q", 1)
        return _even(round(draws(p, rng) / step) * step)

    return stepped


def _even(multiple: float) -> float:
    """A multiple of a step without what binary fractions add to it: 0.3, not 0.30000000000000004."""
    return multiple if isinstance(multiple, int) else float(f"{multiple:.12g}")


DISTRIBUTIONS: dict[str, Callable[[Parameter, random.Random], float]] = {
    "int_uniform": lambda p, rng: rng.randint(p["min"], p["max"]),
    "uniform": _uniform,
    "q_uniform": _stepped(_uniform),
    "log_uniform_values": _log_uniform_values,
    "q_log_uniform_values": _stepped(_log_uniform_values),
    "log_uniform": lambda p, rng: math.exp(_uniform(p, rng)),
    "normal": _normal,
    "q_normal": _stepped(_normal),
    "log_normal": lambda p, rng: math.exp(_normal(p, rng)),
}


def _distribution(parameter: Parameter) -> str:
    """The distribution's name; between two whole numbers W&B draws whole ones."""
    ends = (parameter.get("min"), parameter.get("max"))
    usual = "int_uniform" if all(isinstance(end, int) for end in ends) else "uniform"
    return str(parameter.get("distribution", usual))


def _check(name: str, parameter: Any, grid: bool) -> None:
    """Raises ConfigError for a parameter that cannot be listed or drawn."""
    if not isinstance(parameter, Mapping) or "parameters" in parameter:
        raise ConfigError(f"parameters.{name} needs value, values, or min and max; nested settings are written a.b")
    if "value" in parameter:
        return
    if "values" in parameter:
        _check_values(name, parameter["values"], parameter.get("probabilities"))
        return
    kind = _distribution(parameter)
    if kind not in DISTRIBUTIONS:
        raise ConfigError(f"parameters.{name}: " + unknown(kind, DISTRIBUTIONS, "distribution"))
    for key in {"min", "max", "mu", "sigma", "q"} & parameter.keys():
        if not _is_number(given := parameter[key]):
            cure = "; YAML reads 1e-4 as text: write 0.0001 or 1.0e-4" if isinstance(given, str) else ""
            raise ConfigError(f"parameters.{name}.{key}={given!r} should be a number{cure}")
    if "normal" not in kind and not ({"min", "max"} <= parameter.keys() and parameter["min"] < parameter["max"]):
        raise ConfigError(f"parameters.{name} needs value, values, or min below max")
    if kind.endswith("log_uniform_values") and parameter["min"] <= 0:
        raise ConfigError(f"parameters.{name}.min={parameter['min']} must be above 0 for {kind}")
    if kind == "int_uniform" and not all(isinstance(parameter[end], int) for end in ("min", "max")):
        raise ConfigError(f"parameters.{name}: int_uniform needs whole numbers as min and max; uniform takes fractions")
    for key in ("q", "sigma"):
        if parameter.get(key, 1) <= 0:
            raise ConfigError(f"parameters.{name}.{key}={parameter[key]} must be above 0")
    _check_extent(name, parameter, kind)
    if grid and counted(parameter) is None:
        raise ConfigError(f"parameters.{name} is drawn from {kind}, which a grid cannot list; give values")


def _check_extent(name: str, parameter: Parameter, kind: str) -> None:
    """Raises ConfigError for a range that no number of this machine spans."""
    deepest = parameter.get("sigma", 1.0) * 10
    ends = [parameter[key] for key in ("min", "max") if key in parameter]
    ends = ends or [parameter.get("mu", 0.0) + deepest, parameter.get("mu", 0.0) - deepest]
    step = parameter.get("q", 1)
    if kind.startswith("log_") and not kind.endswith("values") and max(ends) > HIGHEST_POWER:
        raise ConfigError(f"parameters.{name}: e to the power of {max(ends):.6g} is no number; these are logarithms")
    if any(abs(end) >= step * 2**53 for end in ends) and "q" in parameter:
        raise ConfigError(f"parameters.{name}.q={step} is too fine for numbers as large as {max(map(abs, ends)):.6g}")


def _check_number(runs: int) -> None:
    if runs > MOST_RUNS:
        shown = runs if runs < 10**12 else "more than 10^12"
        raise ConfigError(
            f"these are {shown} runs, and one sweep makes at most {MOST_RUNS}; give fewer values, or count=N"
        )


def _check_words(text: str) -> None:
    """Raises ConfigError for a word that W&B, which reads YAML 1.1, would take for something else."""
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.ScalarEvent) and event.style is None and (right := ambiguous(event.value)):
            line = event.start_mark.line + 1 if event.start_mark else 0
            raise ConfigError(f"line {line}: W&B does not read {event.value} as it stands there; write {right}")


def _check_values(name: str, values: Any, probabilities: Any) -> None:
    """Raises ConfigError for a list of values, or of their probabilities, that is none."""
    if not isinstance(values, list) or not values:
        raise ConfigError(f"parameters.{name}.values={values!r} is not a list with entries; write values: [a, b]")
    if probabilities is None:
        return
    listed = isinstance(probabilities, list) and len(probabilities) == len(values)
    if not listed or not all(_is_number(p) and p >= 0 for p in probabilities) or not sum(probabilities):
        raise ConfigError(
            f"parameters.{name}.probabilities={probabilities!r} should be a list of {len(values)} numbers, one for "
            "each of values: none below 0, not all 0"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _metric(metric: Any) -> tuple[str, bool]:
    """Its name, and whether more is better."""
    if not metric:
        return "", True
    if isinstance(metric, Mapping) and isinstance(metric.get("name"), str) and metric.get("goal", GOALS[0]) in GOALS:
        return metric["name"], metric.get("goal") == "maximize"
    raise ConfigError(f"metric={metric!r} should look like {{name: val/worst_site/dice, goal: maximize}}")


def _words(command: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Settings written into `command`, before and after the parameters; the rest is how W&B starts a process."""
    if not isinstance(command, list) or ARGUMENTS not in command:
        cure = f"[{', '.join(MACROS)}]: train.py takes key=value without hyphens"
        raise ConfigError(f"command={command!r} should be a list of words with {ARGUMENTS}, such as {cure}")
    for part in command:
        if part not in MACROS and ("=" not in str(part) or str(part).startswith(("-", "$"))):
            raise ConfigError(f"command: {part!r} is neither one of {', '.join(MACROS)} nor key=value")
    place = command.index(ARGUMENTS)
    before, after = (tuple(str(p) for p in part if p not in MACROS) for part in (command[:place], command[place:]))
    return before, after


def _key(word: str) -> str:
    return word.partition("=")[0]


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _exact(value: Any) -> str:
    """The short form unless it loses digits."""
    short = _short(value)
    return repr(value) if isinstance(value, float) and float(short) != value else short
