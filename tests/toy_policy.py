"""A policy of a few linears, for what plan, calibration and driver do with any policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla.policy import Attention, InputSite, Observation
from omega_qvla.runtime import DenoisingStep
from omega_qvla.spec import Recipe, recipe_from_dict

WIDTH, HIDDEN = 16, 32


class Network(nn.Module):
    """One language layer that runs once, one action layer that runs in every step, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.language = nn.ModuleDict({"q": nn.Linear(WIDTH, WIDTH), "k": nn.Linear(WIDTH, 8)})
        self.action = nn.ModuleDict({"up": nn.Linear(WIDTH, HIDDEN), "down": nn.Linear(HIDDEN, WIDTH)})
        self.head = nn.Linear(WIDTH, 2)


class InMemory(dict[str, Tensor]):
    """See `omega_qvla.policy.StoredTensors`."""

    def names(self) -> list[str]:
        return list(self)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self[name].dtype

    def read(self, name: str) -> Tensor:
        return self[name]

    def pieces(self, name: str) -> list[Tensor]:
        return [self[name]]


class ToyPolicy:
    """See `omega_qvla.policy.QuantizablePolicy`. What `skip` names does not run: "language" or a step."""

    family, label, execution, noise_shape, execute_steps = "toy", "toy", "float", (3, WIDTH), 1
    denoising_steps = 4

    def __init__(self, skip: str | int | None = None) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = Network()
        self.step = DenoisingStep(self.denoising_steps)
        self.directory = Path()
        self.skip = skip

    def infer(self, observation: Observation, noise: Tensor) -> np.ndarray:
        with torch.no_grad():
            return self.differentiable_actions(observation, noise).numpy()

    def differentiable_actions(self, observation: Observation, noise: Tensor) -> Tensor:
        layers: Any = self.module
        x = noise
        context = torch.from_numpy(observation.state)[:, None]
        if self.skip != "language":
            x = x + layers.language["q"](context) + layers.language["k"](context).mean()
        for step in range(self.denoising_steps):
            if step != self.skip:
                with self.step.at(step):
                    x = x - 0.1 * layers.action["down"](layers.action["up"](x).relu())
        return layers.head(x)

    def denoise(self, observation: Observation, noise: Tensor) -> Tensor:
        raise NotImplementedError

    def resident_bytes(self) -> int:
        return 0

    def sites(self) -> list[InputSite]:
        return [
            InputSite("language.input", "language", "language", ("language.q", "language.k")),
            InputSite("action.input", "action", "action", ("action.up",)),
            InputSite("action.hidden", "action", "action", ("action.down",)),
        ]

    def attentions(self) -> list[Attention]:
        return []

    def kept_because(self, linear: str) -> str:
        return {"head": "the head"}[linear]

    def weight(self, linear: str) -> Tensor:
        weight = self.module.get_submodule(linear).weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def stored_tensors(self) -> InMemory:
        return InMemory(self.module.state_dict())

    def support_files(self) -> dict[str, Path]:
        return {}


def toy_observations(count: int, seed: int = 0) -> Observation:
    state = np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)
    return Observation({}, state, ("do it",) * count)


def recipe(*rules: dict[str, Any]) -> Recipe:
    """A recipe from rules as they stand in TOML."""
    return recipe_from_dict({"name": "test", "summary": "", "rules": list(rules)})


def rules_for_both(table: dict[str, Any]) -> Recipe:
    return recipe({"part": "language", "quantize": table}, {"part": "action", "quantize": table})
