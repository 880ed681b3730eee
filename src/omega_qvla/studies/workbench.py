"""What the studies of layers and actions share: a floating-point policy, the observations that it is calibrated
on and those that it is judged on, and what its linears read there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla import api
from omega_qvla.calibration import Needs, collect
from omega_qvla.evaluation.fidelity import FIDELITY_BATCH, Predictions, predict
from omega_qvla.evaluation.metaworld import metaworld_mt10
from omega_qvla.evaluation.metaworld.task import TASKS
from omega_qvla.evaluation.recording import RecordedObservation, collect_observations, spread
from omega_qvla.evaluation.run import FIDELITY_OBSERVATIONS
from omega_qvla.evaluation.seeds import FIDELITY_FIRST_SEED
from omega_qvla.pack.site import PackedSite
from omega_qvla.policies import open_policy
from omega_qvla.policy import Observation, Policy, QuantizablePolicy
from omega_qvla.quantization import Quantized, quantize_policy
from omega_qvla.runtime import DenoisingStep, installed, quantized_linears
from omega_qvla.spec import Part, Recipe, RecipeError

LAYER_OBSERVATIONS = 32
"""Held-out observations on which the outputs of layers are compared."""
INPUT_NOISE_SEED = 1
"""Of the noise under which their inputs are recorded; calibration uses 0."""

Tokens = Mapping[int | None, Tensor]
"""Inputs of a linear, float32 [tokens, in], by denoising step; step None for parts that have none."""


@dataclass(frozen=True)
class Layer:
    """Where a linear stands in its policy."""

    part: Part
    depth: int
    """Number of its block within the part."""
    kind: str
    """The last component of its name, such as `down_proj`."""


@dataclass(frozen=True)
class OutputError:
    """Squared change of a linear's output by quantization, and its output's power, by denoising step."""

    squared: dict[int | None, float]
    """Sum of (ŷ − y)² over tokens and channels."""
    power: dict[int | None, float]
    """Sum of y²."""

    @property
    def normalized(self) -> float:
        """Normalized MSE over all steps: the ratio of the two sums."""
        return sum(self.squared.values()) / sum(self.power.values())

    @property
    def by_step(self) -> list[float]:
        """Normalized MSE of each step in order."""
        return [self.squared[step] / self.power[step] for step in sorted(self.squared, key=lambda step: step or 0)]


@dataclass(frozen=True)
class Workbench:
    """A floating-point policy with calibration and held-out observations, against which recipes are measured."""

    policy: QuantizablePolicy
    calibration: Observation
    held_out: tuple[RecordedObservation, ...]

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Every linear of language and action, in execution order."""
        found: dict[str, Layer] = {}
        depths: dict[tuple[Part, str], int] = {}
        for site in self.policy.sites():
            depth = depths.setdefault((site.part, site.block), sum(part == site.part for part, _ in depths))
            found |= {name: Layer(site.part, depth, name.rpartition(".")[2]) for name in site.linears}
        return {name: layer for name, layer in found.items() if layer.part != "vision"}

    @cached_property
    def inputs(self) -> dict[str, Tokens]:
        """What every linear of language and action reads on the held-out observations."""
        sites = [site for site in self.policy.sites() if site.part != "vision"]
        records = spread(self.held_out, LAYER_OBSERVATIONS)
        observations = Observation.concatenate([record.observation for record in records])
        needs = {site: Needs(samples=True) for site in sites}
        statistics = collect(self.policy, needs, observations, noise_seed=INPUT_NOISE_SEED)
        return {linear: statistics[site.name].samples for site in sites for linear in site.linears}

    @cached_property
    def reference(self) -> Predictions:
        """Full precision's actions on the held-out observations."""
        return predict(self.policy, self.held_out)

    def quantize(self, recipe: Recipe) -> Quantized:
        """The policy's linears under the recipe. Raises what `quantize_policy` raises."""
        return quantize_policy(self.policy, recipe, self.calibration)

    @contextmanager
    def running(self, recipe: Recipe | None) -> Iterator[Policy]:
        """While open, the policy runs quantized by the recipe; in full precision if it is None.

        Raises `RecipeError` for a recipe whose corrections change layers that stay in floating point.
        """
        if recipe is None:
            yield self.policy
            return
        quantized = self.quantize(recipe)
        if quantized.changed:
            raise RecipeError(
                f"recipe {recipe.name!r} changes {next(iter(quantized.changed))}, which stays in floating point; "
                "quantize to a checkpoint and load that"
            )
        with installed(self.policy.module, quantized.sites, self.policy.step, execution="simulated"):
            yield self.policy

    def output_errors(self, quantized: Quantized) -> dict[str, OutputError]:
        """Of every quantized linear of language and action on the held-out observations."""
        return output_errors(self.policy, quantized.sites, self.inputs)


@cache
def open_workbench(checkpoint: Path) -> Workbench:
    """A checkpoint with observations of its own Meta-World episodes; each process opens it once.

    Raises `CheckpointError` if it is not a floating-point checkpoint.
    """
    policy = open_policy(checkpoint)
    calibration = api.calibrate_on_rollouts(policy)
    episodes = [(task, FIDELITY_FIRST_SEED) for task in TASKS]
    held_out = spread(collect_observations(policy, episodes, metaworld_mt10()), FIDELITY_OBSERVATIONS)
    return Workbench(policy, calibration.observations, tuple(held_out))


def answers(policy: Policy, recorded: Sequence[RecordedObservation]) -> np.ndarray:
    """The policy's chunks on recorded observations under each one's own noise, float32 [N, chunk, dimension]."""
    chunks = []
    for start in range(0, len(recorded), FIDELITY_BATCH):
        part = recorded[start : start + FIDELITY_BATCH]
        observation = Observation.concatenate([record.observation for record in part])
        chunks.append(policy.infer(observation, torch.cat([record.noise(policy.noise_shape) for record in part])))
    return np.concatenate(chunks)


def layer_records(bench: Workbench, errors: Mapping[str, OutputError]) -> list[dict[str, Any]]:
    """As JSON: part, depth and kind of each layer with its normalized output error `nmse`."""
    return [asdict(bench.layers[linear]) | {"nmse": error.normalized} for linear, error in errors.items()]


class Original(Protocol):
    """What holds linears in floating point, such as a policy."""

    module: nn.Module
    denoising_steps: int


@torch.no_grad()
def output_errors(
    original: Original, sites: Sequence[PackedSite], inputs: Mapping[str, Tokens]
) -> dict[str, OutputError]:
    """The error of each quantized linear's output, by name, given what it would read in full precision.

    `inputs`: tokens by linear. Raises `KeyError` for a linear without inputs.
    """
    step = DenoisingStep(original.denoising_steps)
    errors = {}
    for site in sites:
        for quantized in quantized_linears(site, step, "simulated"):
            linear = original.module.get_submodule(quantized.name)
            squared, power = {}, {}
            for at, x in inputs[quantized.name].items():
                wanted = linear(x)
                with step.at(at or 0):
                    squared[at] = (quantized(x) - wanted).square().sum().item()
                power[at] = wanted.square().sum().item()
            errors[quantized.name] = OutputError(squared, power)
    return errors
