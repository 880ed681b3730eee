"""The frame of a study: cells that are computed once and kept, and a rendering of all that are finished.

A cell is the unit of work and of resuming. Its result lies in `OUT/NAME/cells/KEY.json` beside a fingerprint of
what was computed with what on which processor; a file with another fingerprint is computed again.
"""

from __future__ import annotations

import json
import re
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from omega_qvla.evaluation.results import describe_machine, write_text
from omega_qvla.evaluation.run import one_thread
from omega_qvla.evaluation.workers import Workers, in_parallel, runs_here

Result = dict[str, Any]
"""What a cell found, as JSON."""

_KEY = re.compile(r"[a-z0-9][a-z0-9._-]*")
_ESTIMATE_OVER = 24 * 3600.0
"""Seconds over which the time left is estimated: cells take minutes."""


class StudyError(RuntimeError):
    """Cells of a study failed; the message names them and says how to go on."""


@dataclass(frozen=True)
class Cell:
    """One result of a study."""

    key: str
    """Name of its file: lower-case letters, digits, dots, hyphens and underscores."""
    what: Mapping[str, Any]
    """Everything that the result depends on besides versions and processor, as JSON: part of the fingerprint."""
    compute: Callable[[], Result]
    """A module-level function or a `functools.partial` of one, so that worker processes can import it."""


@dataclass(frozen=True)
class Options:
    """What the caller of a study chooses."""

    out: Path
    sources: Mapping[str, Path]
    """Name to floating-point checkpoint, such as `policy` and `twin`."""
    tasks: tuple[str, ...]
    """Meta-World tasks of the closed-loop cells."""
    episodes: int | None = None
    """Per task and closed-loop cell; None: as many as the study says."""
    only: str | None = None
    """A regular expression searched in the keys of cells: only those are computed."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.only or "")
        except re.error as error:
            raise ValueError(f"only = {self.only!r} is no regular expression: {error}") from error


class Study(Protocol):
    """Cells and how to show them."""

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str: ...

    @property
    def published(self) -> str:
        """The table or figure that it repeats, with its paper."""
        ...

    def cells(self, options: Options) -> Sequence[Cell]:
        """All cells, the most informative first."""
        ...

    def render(self, results: Mapping[str, Result], out: Path) -> None:
        """Write `NAME.md`, `NAME.csv` and `NAME*.svg` into `out` from the finished cells, by key in the order of
        `cells`. Some may be missing; the frame says which at the top of `NAME.md`. It also writes `NAME.json`."""
        ...


def run_study(study: Study, options: Options, workers: Workers = 1) -> None:
    """Compute the cells that are missing, then render all that are finished.

    With `workers` of 0 or 1 cells run in this process, otherwise each worker process runs one at a time; torch has
    one thread in either case. A cell that fails leaves its traceback in `KEY.error` and does not stop the others.

    Raises `ValueError` for keys that are no file names or occur twice or an `only` that matches no cell, and at the
    end `StudyError` if cells failed.
    """
    cells = study.cells(options)
    _check_keys(study, cells, options.only)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    kept = _Kept(options.out / study.name / "cells", console)
    results = {cell.key: result for cell in cells if (result := kept.read(cell)) is not None}
    missing = [cell for cell in cells if cell.key not in results and re.search(options.only or "", cell.key)]
    console.print(f"{study.name}: {len(cells)} cells, {len(results)} finished, {len(missing)} to compute")
    failed: dict[str, str] = {}
    run = _run_here if runs_here(workers) else partial(_run_elsewhere, workers=workers)
    with _progress(console, len(missing)) as report, closing(run(missing)) as computed:
        for cell, outcome in computed:
            try:
                results[cell.key] = kept.write(cell, *outcome())
                report(cell.key, False)
            except Exception as error:
                failed[cell.key] = f"{type(error).__name__}: {error}"
                kept.write_error(cell, error)
                report(f"{cell.key} failed: {failed[cell.key]}", True)
    ordered = {cell.key: results[cell.key] for cell in cells if cell.key in results}
    if ordered:
        _render(study, ordered, [cell.key for cell in cells if cell.key not in ordered], options.out)
    if failed:
        raise StudyError(
            f"{len(failed)} of {len(missing)} cells of {study.name} failed: "
            + ", ".join(f"{key} ({why})" for key, why in failed.items())
            + f"; their tracebacks are in {kept.directory}, the others are kept: running again computes only these"
        )


def _check_keys(study: Study, cells: Sequence[Cell], only: str | None) -> None:
    keys = [cell.key for cell in cells]
    for key in keys:
        if not _KEY.fullmatch(key):
            raise ValueError(f"cell key {key!r} of study {study.name} is no file name; see Cell.key")
        if keys.count(key) > 1:
            raise ValueError(f"study {study.name} has two cells {key!r}")
    if not any(re.search(only or "", key) for key in keys):
        raise ValueError(f"only = {only!r} matches no cell of study {study.name}; it has {', '.join(keys)}")


class _Kept:
    """The cell files of one study."""

    def __init__(self, directory: Path, console: Console) -> None:
        self.directory, self._console = directory, console
        machine = describe_machine()
        packages = {name: machine.packages[name] for name in ("omega-qvla", "torch")}
        self._circumstances = {"packages": packages, "cpu": machine.cpu}

    def read(self, cell: Cell) -> Result | None:
        """The kept result; None if there is none, or one that was computed in another way.

        Raises `ValueError` for a file that no cell wrote.
        """
        path = self.directory / f"{cell.key}.json"
        if not path.exists():
            return None
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            fingerprint, result = document["fingerprint"], document["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the file of a cell; remove it to compute it again") from error
        if fingerprint == self._fingerprint(cell):
            return result
        self._console.print(f"{cell.key}: kept result is of other inputs, versions or processor: it is not used")
        return None

    def write(self, cell: Cell, result: Result, seconds: float) -> Result:
        """Keep the result and return it as it will be read. Raises `ValueError` if it holds NaN or infinity."""
        document = {"fingerprint": self._fingerprint(cell), "seconds": round(seconds, 1), "result": result}
        text = json.dumps(document, allow_nan=False)
        write_text(self.directory / f"{cell.key}.json", text + "\n")
        (self.directory / f"{cell.key}.error").unlink(missing_ok=True)
        return json.loads(text)["result"]

    def write_error(self, cell: Cell, error: Exception) -> None:
        write_text(self.directory / f"{cell.key}.error", "".join(traceback.format_exception(error)))

    def _fingerprint(self, cell: Cell) -> dict[str, Any]:
        return json.loads(json.dumps({"what": dict(cell.what), **self._circumstances}))


Outcome = Callable[[], tuple[Result, float]]
"""Gives a cell's result and the seconds that it took, or raises what its computation raised."""


def _compute(cell: Cell) -> tuple[Result, float]:
    started = time.monotonic()
    return cell.compute(), time.monotonic() - started


def _run_here(cells: Sequence[Cell]) -> Generator[tuple[Cell, Outcome]]:
    with one_thread():
        for cell in cells:
            yield cell, partial(_compute, cell)


def _run_elsewhere(cells: Sequence[Cell], workers: Workers) -> Generator[tuple[Cell, Outcome]]:
    with closing(in_parallel(_compute, cells, workers)) as finished:
        for cell, future in finished:
            yield cell, future.result


def _render(study: Study, results: Mapping[str, Result], missing: Sequence[str], out: Path) -> None:
    document = {
        "study": study.name,
        "published": study.published,
        "machine": vars(describe_machine()),
        "missing": missing,
        "cells": results,
    }
    write_text(out / f"{study.name}.json", json.dumps(document) + "\n")
    study.render(results, out)
    if missing:
        path = out / f"{study.name}.md"
        note = f"**Incomplete: {len(missing)} of {len(missing) + len(results)} cells are missing**"
        how = f"`omega-qvla reproduce {study.name}` computes them"
        write_text(path, f"{note} ({', '.join(missing)}); {how}.\n\n" + path.read_text(encoding="utf-8"))


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[str, bool], None]]:
    """A bar with the time left on a terminal; a line per cell otherwise, and in either case for a failure."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    terminal = console.is_terminal
    with Progress(*columns, console=console, disable=not terminal, speed_estimate_period=_ESTIMATE_OVER) as progress:
        bar = progress.add_task("cells", total=total)

        def report(line: str, failure: bool) -> None:
            progress.advance(bar)
            task = progress.tasks[bar]
            if failure or not terminal:
                console.print(f"{task.completed:.0f} of {total}, {task.elapsed or 0:.0f} s: {line}", markup=False)

        yield report
