"""Everything an evaluation found, and its JSON file.

The file holds every episode; derived figures are written beside them for readers and computed anew on load.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omega_qvla.evaluation.fidelity import Fidelity
from omega_qvla.evaluation.latency import Latency
from omega_qvla.evaluation.layer_error import LayerError
from omega_qvla.evaluation.recording import FrameStrip
from omega_qvla.evaluation.rollout import Episode
from omega_qvla.evaluation.statistics import PairedComparison, SuccessRate, compare, success_rate
from omega_qvla.evaluation.traces import ActionTrace

SCHEMA_VERSION = 1
NOT_INSTALLED = "not installed"
_PACKAGES = ("omega-qvla", "torch", "lerobot", "metaworld", "mujoco", "hf-libero", "robosuite", "numpy")


@dataclass(frozen=True)
class Machine:
    """Where an evaluation ran, so that its figures can be placed."""

    created: str
    """Time in UTC, ISO 8601."""
    python: str
    cpu: str
    platform: str
    packages: dict[str, str]
    """Package name to version, or `not installed`."""


@dataclass(frozen=True)
class PolicyResult:
    """One policy's episodes and measurements."""

    label: str
    execution: str
    """`float`, `simulated` or `integer`."""
    path: str | None
    """Name of its directory, without the way to it, which is nobody's business in a published report."""
    bytes_on_disk: int | None
    resident_bytes: int
    execute_steps: int
    episodes: tuple[Episode, ...]
    fidelity: Fidelity | None = None
    latency: Latency | None = None
    layers: tuple[LayerError, ...] = ()
    """Of each quantized linear in execution order; empty where they were not measured."""
    bytes_by_part: dict[str, int] | None = None
    """Of `bytes_on_disk`, by part of the policy."""
    manifest_sha256: str | None = None
    """Of the quantized checkpoint's manifest, which names the hashes of all its other files: it says which checkpoint
    was judged. None in floating point, and in files of before it was written down."""

    def success(self, task: str | None = None) -> SuccessRate:
        """Success rate over one task, or over all."""
        chosen = [episode for episode in self.episodes if task in (None, episode.task)]
        return success_rate(sum(episode.success for episode in chosen), len(chosen))

    def mean_steps(self) -> float | None:
        """Mean number of executed actions of the solved episodes; `None` if none is solved."""
        steps = [episode.steps for episode in self.episodes if episode.success]
        return sum(steps) / len(steps) if steps else None

    def outcomes(self, task: str | None = None) -> dict[tuple[str, int], bool]:
        """Episode (task, seed) to success."""
        return {(e.task, e.seed): e.success for e in self.episodes if task in (None, e.task)}


@dataclass(frozen=True)
class Evaluation:
    """A comparison of policies on the same episodes; the first policy is the reference."""

    machine: Machine
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    max_steps: int
    lanes: int
    policies: tuple[PolicyResult, ...]
    fidelity_seeds: tuple[int, ...] = ()
    strips: tuple[FrameStrip, ...] = ()
    benchmark: str = "MT10"
    """Its name; files that do not state one are of Meta-World's MT10."""
    conditions: dict[str, str | int] = field(default_factory=dict)
    """What else the figures of this benchmark have to name."""
    instructions: dict[str, str] = field(default_factory=dict)
    """Task to the sentence that the policies were given."""
    traces: tuple[ActionTrace, ...] = ()
    """Of the held-out episodes on which policies deviate most and least from the reference."""

    def reference(self) -> PolicyResult:
        """The policy that the others are compared with."""
        return self.policies[0]

    def paired(self, policy: PolicyResult, task: str | None = None) -> PairedComparison:
        """A policy against the reference on the same episodes, over one task or over all."""
        return compare(policy.outcomes(task), self.reference().outcomes(task))


def describe_machine() -> Machine:
    """This machine, now."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    packages = {name: _version(name) for name in _PACKAGES}
    return Machine(created, platform.python_version(), _cpu_name(), platform.platform(), packages)


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of every file below a directory. Raises `FileNotFoundError` if there is nothing."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def manifest_digest(path: Path) -> str | None:
    """What identifies the quantized checkpoint in `path`, if it is one."""
    manifest = path / "manifest.json"
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None


def to_json(evaluation: Evaluation) -> str:
    """The evaluation as JSON text; NaN and infinity are refused with `ValueError`."""
    document: dict[str, Any] = {"schema_version": SCHEMA_VERSION} | asdict(evaluation)
    for written, policy in zip(document["policies"], evaluation.policies, strict=True):
        written["derived"] = _derived(evaluation, policy)
    return json.dumps(document, indent=1, allow_nan=False)


def from_json(text: str) -> Evaluation:
    """Read JSON text. Raises `ValueError` for another schema version or a missing or foreign field."""
    document = json.loads(text)
    found = document.pop("schema_version", None) if isinstance(document, dict) else None
    if found != SCHEMA_VERSION:
        raise ValueError(f"evaluation file has schema version {found}; this program reads {SCHEMA_VERSION}")
    try:
        policies = tuple(_policy(written) for written in document.pop("policies"))
        machine = Machine(**document.pop("machine"))
        strips = tuple(FrameStrip(**strip) for strip in document.pop("strips"))
        traces = tuple(
            ActionTrace(**trace | {"starts": tuple(trace["starts"])}) for trace in document.pop("traces", ())
        )
        lists: dict[str, Any] = {name: tuple(document.pop(name)) for name in ("tasks", "seeds", "fidelity_seeds")}
        return Evaluation(machine=machine, policies=policies, strips=strips, traces=traces, **lists, **document)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an evaluation file: {error}") from error


def save(evaluation: Evaluation, path: Path) -> None:
    """Write the JSON file; it appears under its name only when it is complete."""
    write_text(path, to_json(evaluation))


def load(path: Path) -> Evaluation:
    """Read an evaluation that `save` wrote. Raises `ValueError` as `from_json` does."""
    return from_json(path.read_text(encoding="utf-8"))


def write_text(path: Path, text: str) -> None:
    """Write beside the file and rename, so that an interrupted run leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _policy(written: Mapping[str, Any]) -> PolicyResult:
    fields = {name: value for name, value in written.items() if name != "derived"}
    fields["episodes"] = tuple(Episode(**episode) for episode in fields["episodes"])
    if fields["fidelity"] is not None:
        measured: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields["fidelity"].items()
        }
        fields["fidelity"] = Fidelity(**measured)
    fields["layers"] = tuple(LayerError(**layer) for layer in fields.get("layers", ()))
    if fields["latency"] is not None:
        fields["latency"] = Latency(**fields["latency"])
    return PolicyResult(**fields)


def _derived(evaluation: Evaluation, policy: PolicyResult) -> dict[str, Any]:
    paired = None if policy is evaluation.reference() else asdict(evaluation.paired(policy))
    return {
        "success": asdict(policy.success()),
        "success_per_task": {task: asdict(policy.success(task)) for task in evaluation.tasks},
        "paired_with_reference": paired,
        "mean_steps_to_success": policy.mean_steps(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED


def _cpu_name() -> str:
    """The model name; `platform.processor` is empty on most Linux systems."""
    cpuinfo = Path("/proc/cpuinfo")
    lines: Sequence[str] = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else ()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
