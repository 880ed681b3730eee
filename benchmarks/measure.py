"""What the benchmarks share: variants of recipes, held-out observations, errors of layers and actions."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from omega_qvla import api
from omega_qvla.calibration import Needs, SiteStatistics, collect
from omega_qvla.evaluation.fidelity import Fidelity, Predictions, action_fidelity, predict
from omega_qvla.evaluation.metaworld import TASKS
from omega_qvla.evaluation.recording import RecordedObservation, collect_observations, spread
from omega_qvla.evaluation.seeds import FIDELITY_FIRST_SEED
from omega_qvla.policies import open_policy
from omega_qvla.policies.pi05 import PI05
from omega_qvla.policy import Observation
from omega_qvla.quantization import Quantized, quantize_policy
from omega_qvla.runtime import DenoisingStep, QuantizedInput, QuantizedLinear, install
from omega_qvla.spec import LinearSpec, Part, Recipe

HELD_OUT = 128


def changed(recipe: Recipe, name: str, parts: tuple[Part, ...] = ("language", "action"), **changes: Any) -> Recipe:
    """The recipe under another name with pieces of its specs replaced in the given parts.

    `changes` are dictionaries of fields for `transform`, `weight` and `activation`.
    """

    def change(spec: LinearSpec) -> LinearSpec:
        pieces = {piece: replace(getattr(spec, piece), **fields) for piece, fields in changes.items()}
        return replace(spec, **pieces)

    rules = tuple(
        replace(rule, quantize=change(rule.quantize)) if rule.quantize and rule.part in parts else rule
        for rule in recipe.rules
    )
    return replace(recipe, name=name, rules=rules)


@dataclass(frozen=True)
class Errors:
    """How far a quantized policy is from full precision on held-out observations."""

    actions: Fidelity
    layers: dict[str, float]
    """Normalized output error by part and kind of layer, averaged over the layers."""


class Bench:
    """One floating-point policy with calibration and held-out observations, against which variants are measured."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.policy = open_policy(checkpoint)
        self.calibration = api.calibrate_on_rollouts(self.policy)
        episodes = [(task, FIDELITY_FIRST_SEED) for task in TASKS]
        self.held_out: list[RecordedObservation] = spread(collect_observations(self.policy, episodes), HELD_OUT)
        self.reference: Predictions = predict(self.policy, self.held_out)
        self.inputs = self._inputs()

    def _inputs(self) -> dict[str, SiteStatistics]:
        """Held-out layer inputs by linear."""
        sites = {site: Needs(samples=True) for site in self.policy.sites() if site.part != "vision"}
        observations = Observation.concatenate([record.observation for record in self.held_out[::4]])
        statistics = collect(self.policy, sites, observations, noise_seed=1)
        return {linear: statistics[site.name] for site in sites for linear in site.linears}

    def quantize(self, recipe: Recipe) -> Quantized:
        return quantize_policy(self.policy, recipe, self.calibration.observations)

    def running(self, quantized: Quantized) -> PI05:
        """The policy with these quantized linears."""
        policy = open_policy(self.checkpoint)
        install(policy.module, quantized.sites, policy.step, "simulated")
        policy.label = quantized.plan.recipe.name
        return policy

    def errors(self, recipe: Recipe) -> Errors:
        quantized = self.quantize(recipe)
        predictions = predict(self.running(quantized), self.held_out)
        return Errors(action_fidelity(self.reference, predictions), self.layer_errors(quantized))

    def layer_errors(self, quantized: Quantized) -> dict[str, float]:
        """Normalized output error on held-out inputs, as `part kind` to its mean over the layers."""
        found: dict[str, list[float]] = defaultdict(list)
        step = DenoisingStep(self.policy.denoising_steps)
        for site in quantized.sites:
            source = QuantizedInput(site, step)
            for packed in site.linears:
                linear = QuantizedLinear(packed, site, source, "simulated")
                weight = self.policy.module.get_submodule(packed.name).weight
                error = power = 0.0
                for at, x in self.inputs[packed.name].samples.items():
                    with step.at(at or 0):
                        difference = linear(x) - x @ weight.t()
                    error += difference.square().sum().item()
                    power += (x @ weight.t()).square().sum().item()
                found[f"{site.part} {packed.name.rpartition('.')[2]}"].append(error / power)
        return {kind: sum(values) / len(values) for kind, values in found.items()}


torch.set_grad_enabled(False)
