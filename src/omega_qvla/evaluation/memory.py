"""What a loaded policy keeps in memory, measured on a process that has loaded nothing else."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from omega_qvla.evaluation.processes import in_processes

_SMAPS = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True)
class ResidentMemory:
    """Bytes of physical memory of a process."""

    anonymous: int
    """What only this process has: it was allocated, or copied from a file and changed."""
    file_backed: int
    """Pages of mapped files that were touched; the system can take them back."""

    @property
    def total(self) -> int:
        return self.anonymous + self.file_backed


@dataclass(frozen=True)
class ResidentReport:
    """Physical memory of a process before and after it loaded something."""

    imported: ResidentMemory
    """With the modules imported, and nothing loaded."""
    loaded: ResidentMemory

    @property
    def growth(self) -> ResidentMemory:
        """What loading added; a part is negative where memory was given back."""
        return ResidentMemory(
            self.loaded.anonymous - self.imported.anonymous,
            self.loaded.file_backed - self.imported.file_backed,
        )


def measure_resident_memory(load: Callable[[], object], imports: Sequence[str] = ()) -> ResidentReport:
    """Call `load` in a new process and measure while its result is alive and idle.

    `load` goes to that process: a function of a module, or a `functools.partial` of one. `imports`: modules that
    it would import only when it is called, such as a policy's library, so that their code is not counted as loaded.

    Raises what `load` raises, and `OSError` on systems that do not tell (it is read from `/proc`).
    """
    ((_, future),) = in_processes(_measure, [(load, tuple(imports))], workers=1)
    return future.result()


def _measure(job: tuple[Callable[[], object], tuple[str, ...]]) -> ResidentReport:
    load, imports = job
    for module in imports:
        import_module(module)
    imported = _resident()
    result = load()
    loaded = _resident()
    del result  # alive until here
    return ResidentReport(imported, loaded)


def _resident() -> ResidentMemory:
    gc.collect()
    try:
        text = _SMAPS.read_text()
    except FileNotFoundError as error:
        raise OSError(f"resident memory is read from {_SMAPS}, which this system lacks; measure on Linux") from error
    sizes = {key: 1024 * int(size) for key, size in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}
    return ResidentMemory(sizes["Anonymous"], sizes["Rss"] - sizes["Anonymous"])
