"""A sweep file run on this machine, without W&B: the combinations in parallel, each in a folder of its own."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

import pandas as pd
import torch
from omegaconf import DictConfig

from fedseg.common.cores import usable_cores
from fedseg.common.files import write_atomic
from fedseg.common.processes import lives
from fedseg.configs.compose import ConfigError, compose
from fedseg.configs.sweeps import Combination, Sweep
from fedseg.federation.checkpoint import CheckpointError
from fedseg.launch.command import whole
from fedseg.launch.protocols.folds import folds_finished
from fedseg.launch.protocols.stages import changes, is_used
from fedseg.launch.protocols.stages import plan as plan_stages
from fedseg.launch.run import differences, finished, saved_config, stretched
from fedseg.launch.settings import SCHEMA
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import COST, METRICS, RunFolder, complete_lines
from fedseg.reporting.progress import duration
from fedseg.reporting.reporter import sweep_values
from fedseg.reporting.summary import Table, summarise

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
OWN = ("output", "jobs", "count", "sweep_seed")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
DEVICES = "CUDA_VISIBLE_DEVICES"
SCORES = ("best/test/global/dice", "best/test/personal/dice")
PATIENCE = 30.0  # seconds that a run has to end after an interruption
MOST_ROWS = 40  # of the table on the terminal
DONE, FAILED = "finished", "failed"


@dataclass(frozen=True)
class Job:
    """One combination.

    Attributes:
        name: of its folder.
        combination: the settings that the sweep gives it.
        arguments: of `train.py`.
        config: what they make.
        folder: where it runs; what it prints goes to `log` beside it.
    """

    name: str
    combination: Combination
    arguments: tuple[str, ...]
    config: DictConfig
    folder: Path

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def threads(self) -> int:
        """Threads of the run on the CPU; one unless the config says more, so that runs do not disturb each other."""
        return int(self.config.trainer.threads or 1)

    def finished(self) -> bool:
        """Whether the run came to its end with these settings.

        Raises:
            ConfigError: the folder holds a run with other settings.
        """
        try:
            changed, done = self._stages() if self.config.stages else self._run()
        except (CheckpointError, ConfigError, ReportingError):
            return False  # it is damaged: its own process says how, and the others go on
        if changed:
            raise ConfigError(f"{self.folder} holds a run with other settings ({changed}); take another output=")
        return done

    def _run(self) -> tuple[str, bool]:
        """Settings that are other ones than in the folder, and whether the run came to its end."""
        folder = RunFolder(self.folder)
        if not folder.holds_run:
            return "", False
        saved = saved_config(folder)
        changed = differences(saved, self.config) or stretched(saved, self.config)
        if self.config.protocol == "leave_one_site_out":
            return changed, folds_finished(self.config, self.folder)
        return changed, finished(folder, self.config.federation.rounds)

    def _stages(self) -> tuple[str, bool]:
        """The same of all stages."""
        stages = plan_stages(self.arguments, self.config, self.folder)
        changed = [f"stage {s.number}: {told}" for s in stages if (told := changes(s, is_used(stages, s)))]
        return "; ".join(changed), all(finished(s.folder, s.config.federation.rounds) for s in stages)

    def command(self) -> list[str]:
        """Start it, or go on with it."""
        again = [] if self.config.stages or not RunFolder(self.folder).holds_run else ["resume=true"]
        return [sys.executable, str(TRAIN), *self.arguments, *again]

    def values(self) -> dict[str, float]:
        """The numbers of its result, by the names that they have at W&B.

        Raises:
            ReportingError: its scores are damaged, or gone.
        """
        folder = RunFolder(self.folder / str(len(self.config.stages)) if self.config.stages else self.folder)
        scores = folder.scores()
        if scores.empty and len(complete_lines(folder.summary_path)) > 1:
            raise ReportingError(f"{folder.path / METRICS} is gone, or empty, though the run is finished; restore it.")
        if self.config.protocol == "leave_one_site_out":
            scores = scores.assign(seen=True)  # held-out sites only: they are the result
        summary = summarise(scores)
        return {**summary.values, **sweep_values(summary)}

    def seconds(self) -> float:
        """How long the processes worked that brought it, or its folds or stages, to their end; 0 if nobody knows."""
        try:
            costs = [RunFolder(path.parent).costs() for path in sorted(self.folder.rglob(COST))]
            return sum(float(cost["wall_seconds"]) for processes in costs for cost in processes)
        except (ValueError, TypeError, KeyError):
            return 0.0  # it is damaged; no result depends on it


@dataclass
class Result:
    """What became of a job.

    Attributes:
        job: which one.
        state: DONE or FAILED.
        seconds: how long it took; 0 if nobody knows.
        exit_code: of its process; a signal's number, negative, if that killed it.
        values: its scores.
        complaint: what went wrong, of a failure.
    """

    job: Job
    state: str
    seconds: float = 0.0
    exit_code: int = 0
    values: dict[str, float] = field(default_factory=dict)
    complaint: str = ""

    @property
    def failure(self) -> str:
        """How it failed, and why."""
        if self.exit_code < 0:
            how = f"killed by signal {-self.exit_code}, {signal.strsignal(-self.exit_code)}"
        else:
            how = f"exit code {self.exit_code}" if self.exit_code else "its result cannot be read"
        return f"({how}): {self.complaint}"


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    begin: int  # of what it prints, in the log of all attempts
    slot: Mapping[str, str]
    started: float


def run_sweep(given: Sequence[str]) -> int:
    """Run a sweep file.

    Args:
        given: the sweep file, then `output=`, `jobs=`, `count=`, `sweep_seed=` and settings for all runs.

    Returns:
        0 if every run came to its end, 1 if one failed.

    Raises:
        ConfigError, ReportingError: a mistake; nothing has started.
    """
    own, settings = split(given[1:])
    original = Sweep.read(given[0])
    sweep = original.fixed(settings)
    count = whole("count", own["count"], 1) if "count" in own else None
    output = Path(own.get("output") or Path("runs") / sweep.name)
    jobs = plan(sweep, sweep.combinations(count, whole("sweep_seed", own.get("sweep_seed", "0"), 0)), output)
    slots = workers([job.config for job in jobs], whole("jobs", own["jobs"], 1) if "jobs" in own else None)
    report = ProgressPrinter(sweep, jobs, output, len(slots))
    report.notes()
    if RunFolder(output).holds_run:
        raise ReportingError(f"{output} holds a run; take a folder of its own for a sweep")
    output.mkdir(parents=True, exist_ok=True)
    with alone_in(output) as lock, hang_up_interrupts():
        for job in jobs:
            if job.finished():
                report.add(outcome(job, job.seconds()), new=False)
        left = [job for job in jobs if job.name not in report.results]
        report.start(len(left))
        with closing(run_jobs(left, slots, lock)) as results:  # an interruption of this loop, too, ends the runs
            for result in results:
                report.add(result)
    report.end()
    return int(any(result.state == FAILED for result in report.results.values()))


def plan(sweep: Sweep, combinations: Sequence[Combination], output: Path) -> list[Job]:
    """All jobs; a combination that was drawn twice is run once.

    Raises:
        ConfigError: a combination makes no config; nothing has started.
    """
    jobs: dict[str, Job] = {}
    for combination in combinations:
        name = sweep.run_name(combination)
        told = [*sweep.settings(combination), f"output={output / name}"]
        try:
            config = compose(told, SCHEMA)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        if config.trainer.threads is None:
            told.append("trainer.threads=1")
        jobs.setdefault(name, Job(name, combination, tuple(told), config, output / name))
    return list(jobs.values())


def workers(configs: Sequence[DictConfig], asked: int | None) -> list[dict[str, str]]:
    """The environment of each place where a run can work: one per GPU, else as many as the cores have threads for.

    Args:
        configs: of all runs: their accelerators and threads; any of them may come to any place.
        asked: how many; more than GPUs share them.
    """
    gpus: list[str] = []
    if any(config.trainer.accelerator != "cpu" for config in configs) and torch.cuda.is_available():
        given = os.environ.get(DEVICES)
        gpus = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
    cores = usable_cores()
    threads = max(int(config.trainer.threads or 1) for config in configs)
    count = asked or len(gpus) or max(1, cores // threads)
    return [{DEVICES: gpus[index % len(gpus)]} if gpus else {} for index in range(count)]


def run_jobs(
    jobs: Sequence[Job], slots: Sequence[Mapping[str, str]], lock: int | None = None
) -> Generator[Result, None, None]:
    """Run jobs, as many at a time as there are slots; results in the order in which they end.

    Args:
        jobs: what to run.
        slots: additional environment of each place.
        lock: a file that the runs hold open, so that it is locked for as long as one of them lives; it lists them.
    """
    waiting, free = list(jobs), list(slots)
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and free:
                running.append(_start(waiting.pop(0), free.pop(0), lock))
            ended = [run for run in running if run.process.poll() is not None]
            for run in ended:
                running.remove(run)
                free.append(run.slot)
                yield _result(run)
            if not ended:
                time.sleep(0.1)
    finally:
        _stop(running)


def _start(job: Job, slot: Mapping[str, str], lock: int | None) -> _Running:
    command = job.command()
    log = job.log.open("ab")
    log.write(f"$ {shlex.join(command)}\n".encode())
    log.flush()
    begin = log.tell()
    environment = {**os.environ, **dict.fromkeys(THREADS, str(job.threads)), **slot}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # an interruption reaches the runs once, from here
        pass_fds=() if lock is None else (lock,),
    )
    if lock is not None:
        os.write(lock, f"{process.pid}\n".encode())
    return _Running(job, process, log, begin, slot, time.monotonic())


def _result(run: _Running) -> Result:
    run.log.close()
    seconds, code = time.monotonic() - run.started, run.process.returncode
    if code:
        return Result(run.job, FAILED, seconds, code, complaint=_complaint(run.job.log, run.begin))
    return outcome(run.job, seconds)


def outcome(job: Job, seconds: float) -> Result:
    """Of a run that came to its end; without its scores it is worth nothing, but the others go on."""
    try:
        return Result(job, DONE, seconds, values=job.values())
    except ReportingError as error:
        cure = f"To repeat the run, delete {job.folder} and give the same command."
        return Result(job, FAILED, seconds, complaint=f"{error} {cure}")


def _complaint(log: Path, begin: int) -> str:
    """The last line that says what went wrong: an error message, or the end of a stack trace."""
    lines = [line for line in log.read_bytes()[begin:].decode(errors="replace").splitlines() if line.strip()]
    found, in_trace = "", False
    for line in lines:
        if line.startswith("error: ") or (in_trace and not line[0].isspace()):
            found = line
        in_trace = line.startswith("Traceback ") or (in_trace and line[0].isspace())
    return found or (lines or ["it printed nothing"])[-1]


def _stop(running: Sequence[_Running]) -> None:
    """Interrupt what still runs, and kill what does not end in time or after a second interruption."""
    try:
        for run in running:
            run.process.terminate()
        limit = time.monotonic() + PATIENCE
        for run in running:
            run.process.wait(max(0.0, limit - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for run in running:
            run.process.kill()
    for run in running:
        run.process.wait()
        run.log.close()


class ProgressPrinter:
    """Tells how far a sweep is, and keeps sweep.csv.

    Args:
        sweep: what runs.
        jobs: all of its jobs.
        output: its folder.
        parallel: how many run at a time.
    """

    def __init__(self, sweep: Sweep, jobs: Sequence[Job], output: Path, parallel: int) -> None:
        self.sweep = sweep
        self.jobs = jobs
        self.output = output
        self.parallel = parallel
        self.columns = tuple(dict.fromkeys([sweep.metric, *SCORES] if sweep.metric else SCORES))
        self.results: dict[str, Result] = {}
        self._new = 0
        self._started = time.monotonic()

    def notes(self) -> None:
        """What W&B would do and this does not."""
        if self.sweep.method == "bayes":
            print("method=bayes needs W&B; here the same settings are drawn at random")
        if len(self.jobs) == self.sweep.run_cap:
            print(f"run_cap={self.sweep.run_cap} of the sweep file: no more runs than that")
        if self.sweep.early_terminate:
            print("early_terminate needs W&B; here every run goes on to its end")

    def start(self, left: int) -> None:
        """The first line."""
        self._started = time.monotonic()
        before = sum(result.state == DONE for result in self.results.values())
        done = f", {before} of them finished before" if before else ""
        many = f", {min(self.parallel, left)} at a time" if left else ""
        print(f"{self.sweep.name}: {len(self.jobs)} runs{done}{many}; folder: {self.output}", flush=True)

    def add(self, result: Result, *, new: bool = True) -> None:
        """A job has ended: a line, and a row of the table."""
        self.results[result.job.name] = result
        self._write()
        if not new:
            if result.state == FAILED:
                print(f"{result.job.name}  FAILED {result.failure}", flush=True)
            return
        self._new += 1
        if result.state == FAILED:
            told = f"FAILED {result.failure}"
        else:
            known = [f"{name} {result.values[name]:.4f}" for name in self.columns if name in result.values]
            told = "  ".join(known) or "no score"
        left = len(self.jobs) - len(self.results)
        rest = f"  {duration((time.monotonic() - self._started) / self._new * left)} left" if left else ""
        place = f"[{len(self.results)}/{len(self.jobs)}]"
        print(f"{place} {result.job.name}  {told}  {duration(result.seconds)}{rest}", flush=True)

    def end(self) -> None:
        """The table, and what failed."""
        print(f"\n{self.table().text(sys.stdout)}")
        print(f"All runs: {self.output / 'sweep.csv'}")
        for result in self.results.values():
            if result.state == FAILED:
                print(f"failed: {result.job.name} {result.failure} ({result.job.log})", file=sys.stderr)

    def table(self) -> Table:
        """Runs by score, the best first."""
        best = sorted((r for r in self.results.values() if r.state == DONE), key=self._rank)
        rows = [(r.job.name, *(_number(r.values.get(column)) for column in self.columns)) for r in best]
        rows += [(r.job.name, *("failed" for _ in self.columns)) for r in self.results.values() if r.state == FAILED]
        note = f"The first {MOST_ROWS} of {len(rows)} runs." if len(rows) > MOST_ROWS else ""
        return Table(("run", *self.columns), tuple(rows[:MOST_ROWS]), note)

    def _rank(self, result: Result) -> float:
        value = result.values.get(self.columns[0], float("nan"))
        rank = -value if self.sweep.maximize or not self.sweep.metric else value
        return float("inf") if rank != rank else rank

    def _write(self) -> None:
        rows: list[dict[str, Any]] = []
        for job in self.jobs:
            if (result := self.results.get(job.name)) is not None:
                numbers = {column: result.values.get(column) for column in self.columns}
                told = {key: job.combination[key] for key in self.sweep.varying}
                rows.append(
                    {"run": job.name, "state": result.state, **told, **numbers, "seconds": result.seconds or None}
                )
        write_atomic(self.output / "sweep.csv", pd.DataFrame(rows).to_csv(index=False))


def split(given: Sequence[str], names: Sequence[str] = OWN) -> tuple[dict[str, str], dict[str, str]]:
    """A command's own settings, and those of all runs.

    Raises:
        ConfigError: a word that is no setting.
    """
    pairs: dict[str, str] = {}
    for argument in given:
        key, equals, value = argument.partition("=")
        if not equals or key.startswith("-"):
            raise ConfigError(f"{argument!r} is not of the form key=value; see --help")
        pairs[key] = value
    if "resume" in pairs:
        raise ConfigError("resume is not needed: the same command goes on with what was stopped")
    return {k: v for k, v in pairs.items() if k in names}, {k: v for k, v in pairs.items() if k not in names}


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.4f}"


@contextmanager
def alone_in(output: Path) -> Iterator[int | None]:
    """Hold the sweep's folder; its runs inherit the hold, so that a killed sweep's last runs are waited for.

    Raises:
        ReportingError: another sweep works there.
    """
    if sys.platform == "win32":
        yield None
        return
    import fcntl

    with (output / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ReportingError(_holder(output)) from error
        file.truncate(0)
        os.write(file.fileno(), f"{os.getpid()}\n".encode())
        yield file.fileno()


def _holder(output: Path) -> str:
    """Who holds a folder: the lock lists the sweep and then its runs, as processes."""
    told = (output / ".lock").read_text(encoding="utf-8").split()
    listed = [int(process) for process in told if process.isdecimal()]
    living = [process for process in listed if lives(process)]
    if living and living[0] == listed[0]:
        return f"another sweep (process {living[0]}) still works in {output}"
    if living:
        them = " ".join(map(str, living))
        return f"runs of a sweep that was killed still work in {output}; wait for them, or end them: kill {them}"
    return f"another sweep, or a run that it started, still works in {output}; it is on another machine"


@contextmanager
def hang_up_interrupts() -> Iterator[None]:
    """A closed terminal ends the runs as Ctrl-C does: they are sessions of their own, and would go on unattended."""
    if sys.platform == "win32" or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as under nohup
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it may come twice, and a second interruption kills the runs
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGHUP, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
