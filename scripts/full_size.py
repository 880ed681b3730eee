#!/usr/bin/env python
r"""What quantizing a policy of released size takes, measured on a stand-in for it.

    python scripts/full_size.py make pi05 runs/full/pi05
    python scripts/full_size.py measure runs/full/pi05 --memory-budget 8GiB --out runs/full/omega-int4

The quantization runs in a process of its own, on random observations, and is measured from outside: by the time until
it ends, and by what the system says of it then (`wait4`: CPU time and the most physical memory that it had at a time,
pages of mapped files included). `measurement.json` lies beside the quantized checkpoint when everything is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from omega_qvla import api
from omega_qvla.cli.shared import size_in_bytes
from omega_qvla.evaluation.memory import measure_resident_memory
from omega_qvla.pack.checkpoint import written_beside
from omega_qvla.pack.inspect import inspect
from omega_qvla.policies.random_observations import random_observations
from omega_qvla.policies.streaming import StreamedLinear
from omega_qvla.spec import recipe_as

JOB, PREDICTED, FORWARDS = "job.json", "predicted.json", "forwards.json"
CHECKPOINT, MEASUREMENT = "checkpoint", "measurement.json"
"""Files in the output directory."""
REPORTED = ("quantized_linears", "kept_linears", "quantized_bytes", "fp16_bytes", "quantized_share", "total_bytes")
"""What is taken over from the checkpoint's own report."""
LIBRARIES = tuple(f"omega_qvla.policies.{name}" for name in ("pi05", "smolvla", "groot_n15.policy", "groot_n17"))
"""What loading would import first; their code does not count as loaded."""

_KIB = 1024
_POLL = 0.02
"""Seconds between two looks at what is finished."""

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Job:
    """A quantization."""

    checkpoint: str
    recipe: str
    scope: str
    settings: list[str]
    observations: int
    memory_budget: int
    """Bytes."""


@dataclass(frozen=True)
class Taken:
    """What a process took until it ended."""

    seconds: float
    cpu_seconds: float
    memory: int
    """Bytes of physical memory at most, pages of mapped files included."""


@app.command()
def make(
    family: Annotated[
        str, typer.Argument(help="pi05, pi0, smolvla, groot_n15, or only pi05_expert, groot_n15_head.")
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    seed: Annotated[int, typer.Option(help="Of all weights.")] = 0,
) -> None:
    """Write a checkpoint of released size and layout with random weights."""
    import stand_ins  # with the model libraries, which the measuring process is to be without

    stand_ins.make(stand_ins.released(family), out, seed)


@app.command()
def measure(
    checkpoint: Annotated[Path, typer.Argument(help="A floating-point checkpoint of lerobot.")],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    recipe: Annotated[str, typer.Option(help="A recipe's name or a TOML file.")] = "omega-int4",
    settings: Annotated[list[str] | None, typer.Option("--set", help="Replace a field of the recipe.")] = None,
    scope: Annotated[str, typer.Option(help="Which layers.")] = "policy",
    observations: Annotated[int, typer.Option(min=1, help="Random ones, to calibrate on.")] = 10,
    memory_budget: Annotated[str, typer.Option(help="Physical memory to keep to.", metavar="SIZE")] = "8GiB",
) -> None:
    """Quantize a checkpoint in a process of its own; print what it took beside what was predicted."""
    budget = size_in_bytes(memory_budget)
    job = Job(str(checkpoint), recipe, scope, settings or [], observations, budget)
    Console().print(table(measured(job, out)))


@app.command()
def interrupt(
    checkpoint: Annotated[Path, typer.Argument(help="A floating-point checkpoint.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    recipe: Annotated[str, typer.Option(help="A recipe's name or a TOML file.")] = "omega-int4",
    observations: Annotated[int, typer.Option(min=1, help="Random ones, to calibrate on.")] = 2,
    memory_budget: Annotated[str, typer.Option(help="Physical memory to keep to.", metavar="SIZE")] = "8GiB",
    kills: Annotated[int, typer.Option(min=1, help="How often the second run is killed.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Quantize a checkpoint twice, once undisturbed and once killed at random moments; compare all bytes."""
    job = Job(str(checkpoint), recipe, "policy", [], observations, size_in_bytes(memory_budget))
    result = interrupted(job, kills, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(out, result)
    Console().print_json(data=result)
    if not result["identical"]:
        raise RuntimeError(f"the run that was killed wrote other bytes; see {out}")


@app.command(hidden=True)
def run(directory: Path) -> None:
    """The measured process."""
    job = Job(**json.loads((directory / JOB).read_text()))
    recipe = recipe_as(job.recipe, job.settings, job.scope)
    observations = random_observations(Path(job.checkpoint), job.observations)
    with timed(StreamedLinear, "forward") as forwards:
        api.quantize(
            Path(job.checkpoint),
            recipe,
            directory / CHECKPOINT,
            calibration=api.CalibrationSet(observations, ("random",)),
            memory_budget=job.memory_budget,
            on_preflight=lambda needs: _write(directory / PREDICTED, asdict(needs)),
        )
    _write(directory / FORWARDS, {"seconds": sum(forwards)})


@contextmanager
def timed(owner: type, name: str) -> Iterator[list[float]]:
    """While open, the seconds of every call of a method."""
    original, taken = getattr(owner, name), list[float]()

    def measured(*arguments: Any) -> Any:
        start = time.monotonic()
        try:
            return original(*arguments)
        finally:
            taken.append(time.monotonic() - start)

    setattr(owner, name, measured)
    try:
        yield taken
    finally:
        setattr(owner, name, original)


def measured(job: Job, out: Path) -> dict[str, Any]:
    """Do the job, load what it wrote, and write `measurement.json` into the new directory `out`; returns its content.

    Raises `CheckpointError` if `out` exists, `RuntimeError` if the process fails, which has then said why. Nothing
    is left then: half of a run cannot be measured.
    """
    with written_beside(out) as scratch:
        _write(scratch / JOB, asdict(job))
        taken = taken_by([sys.executable, __file__, "run", str(scratch)])
        loaded = measure_resident_memory(partial(api.load, scratch / CHECKPOINT), LIBRARIES).growth
        report = asdict(inspect(scratch / CHECKPOINT))
        result = {
            "job": asdict(job),
            "predicted": json.loads((scratch / PREDICTED).read_text()),
            "taken": asdict(taken),
            "forward_seconds": json.loads((scratch / FORWARDS).read_text())["seconds"],
            "checkpoint": {key: report[key] for key in REPORTED},
            "loaded": asdict(loaded),
        }
        _write(scratch / MEASUREMENT, result)
    return result


def interrupted(job: Job, kills: int, seed: int) -> dict[str, Any]:
    """Do the job undisturbed, and again with `kills` kills (SIGKILL), each a random moment after a random number of
    blocks was finished; returns how many those were, and whether all files are the same bytes.

    Raises `RuntimeError` if a run fails, `ValueError` if there are fewer blocks than kills.
    """
    random = np.random.default_rng(seed)
    recipe = recipe_as(job.recipe, job.settings, job.scope)
    blocks = len({site.block for site in api.plan(Path(job.checkpoint), recipe).sites})
    if kills >= blocks:
        raise ValueError(f"{blocks} blocks cannot be interrupted {kills} times with one finished each time")
    with tempfile.TemporaryDirectory(dir=Path(job.checkpoint).resolve().parent) as scratch:
        whole, broken = Path(scratch, "whole"), Path(scratch, "broken")
        for directory in (whole, broken):
            directory.mkdir()
            _write(directory / JOB, asdict(job))
        seconds = taken_by([sys.executable, __file__, "run", str(whole)]).seconds
        finished: list[int] = []
        for wanted in np.sort(random.choice(np.arange(1, blocks), kills, replace=False)):
            if not (broken / CHECKPOINT).exists():  # the last blocks can be finished at one blow
                finished.append(_killed(broken, after=int(wanted), delay=random.uniform(0, seconds / blocks)))
        if not (broken / CHECKPOINT).exists():
            taken_by([sys.executable, __file__, "run", str(broken)])
        digests = [_digests(directory / CHECKPOINT) for directory in (whole, broken)]
    files = {"identical": digests[0] == digests[1], "files": digests[0]}
    return {
        "job": asdict(job),
        "undisturbed_seconds": seconds,
        "blocks": blocks,
        "killed_after_blocks": finished,
    } | files


def _killed(directory: Path, after: int, delay: float) -> int:
    """Run the job of a directory until so many blocks are finished, and some seconds more, or until it ends; returns
    how many blocks were finished then."""
    process = subprocess.Popen([sys.executable, __file__, "run", str(directory)])
    while process.poll() is None and _finished(directory) < after:
        time.sleep(_POLL)
    time.sleep(delay)
    finished = _finished(directory)
    process.kill()
    if process.wait() > 0:
        raise RuntimeError(f"the run in {directory} ended with exit code {process.returncode} before it was killed")
    return finished


def _finished(directory: Path) -> int:
    return len(list(directory.glob(f".{CHECKPOINT}.unfinished/*.safetensors")))


def _digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path."""
    found = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            found[str(path.relative_to(directory))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def taken_by(command: list[str]) -> Taken:
    """Run a command to its end. Its memory counts from at least what this process itself has, which starts it.

    Raises `RuntimeError` if it fails.
    """
    start = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # it is gone: nothing is left to wait for
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
    return Taken(time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * _KIB)


def table(result: dict[str, Any]) -> Table:
    """A measurement for people."""
    predicted, taken, report, loaded = (result[key] for key in ("predicted", "taken", "checkpoint", "loaded"))
    job = result["job"]
    found = Table("what", "predicted", "measured", title=f"{job['recipe']} on {job['checkpoint']}")
    expected = predicted["forward_seconds"] + predicted["solving_seconds"]
    found.add_row("minutes", f"{expected / 60:.1f}", f"{taken['seconds'] / 60:.1f}")
    found.add_row("  linears of inferences, of these", "", f"{result['forward_seconds'] / 60:.1f}")
    found.add_row("minutes of CPU time", "", f"{taken['cpu_seconds'] / 60:.1f}")
    found.add_row("physical memory", _gib(sum(predicted["memory"].values())), _gib(taken["memory"]))
    found.add_row("  of the budget", "", _gib(job["memory_budget"]))
    found.add_row("disk, and all files in the end", _gib(predicted["disk"]), _gib(report["total_bytes"]))
    found.add_row("linears quantized, kept", "", f"{report['quantized_linears']}, {report['kept_linears']}")
    found.add_row("quantized linears", "", _gib(report["quantized_bytes"]))
    found.add_row("  of what they take at 16 bits", "", f"{report['quantized_share']:.1%}")
    found.add_row("loaded, in memory of its own", "", _gib(loaded["anonymous"]))
    found.add_row("loaded, in pages of files", "", _gib(loaded["file_backed"]))
    return found


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def main() -> None:
    """Run the command; what the user can mend is one sentence."""
    try:
        app()
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
