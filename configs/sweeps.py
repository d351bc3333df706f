"""Sweep files: what `wandb sweep` reads, read for running the same combinations of settings without W&B."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from configs.compose import FOLDER, ConfigError
from configs.knobs import unknown

Parameter = Mapping[str, Any]
Combination = dict[str, Any]
ARGUMENTS = "${args_no_hyphens}"
MACROS = ("${env}", "${interpreter}", "${program}", ARGUMENTS)
KEYS = (
    *("program", "name", "description", "project", "entity", "method", "metric", "parameters", "command"),
    *("early_terminate", "run_cap"),
)
LONGEST_NAME = 100


@dataclass(frozen=True)
class Sweep:
    """A sweep file.

    Attributes:
        name: of the sweep.
        method: grid, random or bayes.
        parameters: setting -> its value, values or distribution.
        metric: the name that is optimised; empty if none.
        maximize: whether more is better.
        literals: settings that every run gets besides, from `command`.
        early_terminate: whether W&B would end hopeless runs early.
    """

    name: str
    method: str
    parameters: Mapping[str, Parameter]
    metric: str = ""
    maximize: bool = True
    literals: tuple[str, ...] = ()
    early_terminate: bool = False
    varying: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        varying = tuple(key for key, parameter in self.parameters.items() if len(listed(parameter) or (0, 0)) > 1)
        object.__setattr__(self, "varying", varying)

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
            content = yaml.safe_load(path.read_text(encoding="utf-8"))  # as W&B reads it; ${env} is no interpolation
            return cls._parsed(content, path)
        except (ConfigError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def _parsed(cls, content: Any, path: Path) -> Sweep:
        if not isinstance(content, Mapping):
            raise ConfigError("this is no sweep: it should hold program, method, parameters and command")
        strange = [key for key in content if key not in KEYS]
        if strange:
            raise ConfigError(unknown(strange[0], KEYS))
        if content.get("program") != "train.py":
            raise ConfigError(f"program={content.get('program')}; only train.py is run here")
        if content.get("method") not in ("grid", "random", "bayes"):
            raise ConfigError(f"method={content.get('method')} should be grid, random or bayes")
        parameters = content.get("parameters")
        if not isinstance(parameters, Mapping) or not parameters:
            raise ConfigError("parameters: there are none")
        for name, parameter in parameters.items():
            _check(str(name), parameter, grid=content["method"] == "grid")
        metric = content.get("metric") or {}
        return cls(
            name=str(content.get("name") or path.stem),
            method=content["method"],
            parameters=dict(parameters),
            metric=str(metric.get("name", "")),
            maximize=metric.get("goal", "minimize") == "maximize",
            literals=_literals(content.get("command")),
            early_terminate="early_terminate" in content,
        )

    def fixed(self, settings: Mapping[str, str]) -> Sweep:
        """The sweep with some settings given by hand: they are no longer varied."""
        parameters = {key: value for key, value in self.parameters.items() if key not in settings}
        literals = [argument for argument in self.literals if argument.partition("=")[0] not in settings]
        literals += [f"{key}={value}" for key, value in settings.items()]
        return Sweep(
            self.name, self.method, parameters, self.metric, self.maximize, tuple(literals), self.early_terminate
        )

    def combinations(self, count: int | None, seed: int) -> list[Combination]:
        """Setting -> value, for each run.

        Args:
            count: how many; a grid has all if it is None. The first ones of a larger count are those of a smaller one.
            seed: of the draws, where there are any.

        Raises:
            ConfigError: a sweep that draws needs a count.
        """
        if self.method == "grid":
            lists = [listed(parameter) or () for parameter in self.parameters.values()]
            combined = itertools.product(*lists)
            return [dict(zip(self.parameters, values, strict=True)) for values in itertools.islice(combined, count)]
        if count is None:
            raise ConfigError(f"method={self.method} draws settings; say how many runs with count=N")
        found: list[Combination] = []
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            found.append({key: draw(parameter, rng) for key, parameter in self.parameters.items()})
        return found

    def run_name(self, combination: Combination) -> str:
        """A name for one run's folder, made of the settings that vary; another one for every combination."""
        last = [key.rpartition(".")[2] for key in self.varying]
        short = [leaf if last.count(leaf) == 1 else key for key, leaf in zip(self.varying, last, strict=True)]
        parts = [f"{name}={_shown(combination[key])}" for name, key in zip(short, self.varying, strict=True)]
        plain = ",".join(parts) or "run"
        name = re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", plain)
        if name == plain and len(name) <= LONGEST_NAME:
            return name
        digest = sha256(plain.encode()).hexdigest()[:8]  # different settings may look alike now
        return f"{name[: LONGEST_NAME - 9]}-{digest}"


def arguments(combination: Combination) -> list[str]:
    """`key=value` as `wandb agent` writes them for ${args_no_hyphens}."""
    return [f"{key}={value}" for key, value in combination.items()]


def listed(parameter: Parameter) -> tuple[Any, ...] | None:
    """All values of a parameter; None if it is drawn from a distribution."""
    if "value" in parameter:
        return (parameter["value"],)
    if "values" in parameter:
        return tuple(parameter["values"])
    if _distribution(parameter) in ("int_uniform", "q_uniform"):
        step = parameter.get("q", 1)
        count = math.floor((parameter["max"] - parameter["min"]) / step + 1e-9) + 1
        return tuple(parameter["min"] + step * index for index in range(count))
    return None


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
        steps = round(draws(p, rng) / step)
        return steps * step if isinstance(step, int) else float(f"{steps * step:.12g}")

    return stepped


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
        if not isinstance(parameter["values"], Sequence) or not parameter["values"]:
            raise ConfigError(f"parameters.{name}.values is not a list with entries")
        return
    kind = _distribution(parameter)
    if kind not in DISTRIBUTIONS:
        raise ConfigError(f"parameters.{name}: " + unknown(kind, DISTRIBUTIONS, "distribution"))
    low, high = parameter.get("min"), parameter.get("max")
    bounded = isinstance(low, int | float) and isinstance(high, int | float) and low < high
    if "normal" not in kind and not bounded:
        raise ConfigError(f"parameters.{name} needs value, values, or min below max")
    if kind.endswith("log_uniform_values") and not (isinstance(low, int | float) and low > 0):
        raise ConfigError(f"parameters.{name}.min={low} must be above 0 for {kind}")
    if grid and listed(parameter) is None:
        raise ConfigError(f"parameters.{name} is drawn from {kind}, which a grid cannot list; give values")


def _literals(command: Any) -> tuple[str, ...]:
    """Settings written into `command`; the rest of it is how W&B starts a process."""
    if not isinstance(command, Sequence) or ARGUMENTS not in command:
        raise ConfigError(f"command needs {ARGUMENTS}: train.py takes key=value without hyphens")
    literals = [str(part) for part in command if part not in MACROS]
    for part in literals:
        if "=" not in part or part.startswith(("-", "$")):
            raise ConfigError(f"command: {part!r} is neither one of {', '.join(MACROS)} nor key=value")
    return tuple(literals)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
