"""What lerobot's flow-matching policies have in common, from opening a checkpoint to actions.

A family is a subclass: it builds lerobot's module and says what its parts are. The denoising loop, one function
for all families (`lerobot.policies.common.flow_matching`), looks `denoise_step` up on the instance for every step,
so that is where the step is known.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any, Self

import numpy as np
import torch
from accelerate import init_empty_weights
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from omega_qvla.pack.checkpoint import KEPT_FILE, Checkpoint
from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.anatomy import Block
from omega_qvla.policy import Attention, InputSite, Observation
from omega_qvla.runtime import DenoisingStep, install
from omega_qvla.runtime.linear import Execution, QuantizedLinear

WEIGHTS_FILE = "model.safetensors"


class LerobotPolicy(ABC):
    """A policy of lerobot, in floating point or quantized; see `omega_qvla.policy` for the interface.

    A family sets the attributes below and implements `build` and `blocks`; `attentions`, if its attention modules
    return their weights.
    """

    family: str
    """lerobot's name for it, the `type` in `config.json`."""
    steps_setting: str = "num_inference_steps"
    """Where its configuration says the number of denoising steps."""
    kept: Mapping[str, str]
    """Why linears outside the blocks stay in floating point; keys are searched in their names."""
    copies: Mapping[str, str] = {}
    """Tensors that a checkpoint may lack, and those that they are then copies of."""
    files: tuple[str, ...] = ("config.json", "policy_*", "tokenizer/*")
    """Patterns of the files, besides weights, that its checkpoint consists of."""

    @classmethod
    @abstractmethod
    def build(cls, config: PreTrainedConfig, directory: Path) -> PreTrainedPolicy:
        """lerobot's module for the checkpoint in `directory`, with any weights, in the dtypes in which it runs.

        Raises `CheckpointError` for a configuration that is not supported.
        """

    @abstractmethod
    def blocks(self) -> list[Block]:
        """The blocks of all parts, in execution order."""

    def attentions(self) -> list[Attention]:
        return []

    def __init__(self, module: PreTrainedPolicy, directory: Path, label: str, execution: str) -> None:
        self.module, self.directory, self.label, self.execution = module.eval(), directory, label, execution
        config, model = module.config, module.model
        self.noise_shape = (config.chunk_size, config.max_action_dim)
        self.execute_steps = config.n_action_steps
        self.denoising_steps = getattr(config, self.steps_setting)
        self.step = DenoisingStep(self.denoising_steps)
        self._preprocessor, self._postprocessor = _processors(config, directory)
        blank = {f"{OBS_IMAGES}.empty_camera_{i}" for i in range(config.empty_cameras)}
        self._cameras = [key.removeprefix(f"{OBS_IMAGES}.") for key in config.image_features if key not in blank]
        self._partial: list[Tensor] = []
        self._denoise_step = model.denoise_step
        model.denoise_step = self._step
        # Without its `torch.no_grad`: whether gradients are recorded is decided by who calls.
        model.sample_actions = MethodType(inspect.unwrap(type(model).sample_actions), model)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """In floating point, from a lerobot checkpoint. Raises `CheckpointError` if it does not load strictly."""
        module = cls.build(cls._config(directory), directory)
        cls._load_strictly(module, _read_weights(directory), directory / WEIGHTS_FILE)
        return cls(module, directory, "full precision", "float")

    @classmethod
    def load(cls, checkpoint: Checkpoint, execution: Execution) -> Self:
        """Quantized, from a verified checkpoint. Weights that were quantized never exist in floating point."""
        directory = checkpoint.policy_directory
        module = cls._without_values(directory)
        recipe = checkpoint.manifest.plan.recipe
        best = recipe.execution
        policy = cls(module, directory, recipe.name, execution if best == "integer" else best)
        if policy.denoising_steps != checkpoint.manifest.denoising_steps:
            raise CheckpointError(
                f"{directory} is configured for {policy.denoising_steps} denoising steps, "
                f"the checkpoint was made for {checkpoint.manifest.denoising_steps}"
            )
        try:
            install(module, checkpoint.sites, policy.step, execution)
        except AttributeError as error:
            raise CheckpointError(
                f"{checkpoint.directory} does not fit the policy in {directory}: {error}"
            ) from error
        cls._load_strictly(module, checkpoint.kept, checkpoint.directory / KEPT_FILE, assign=True)
        return policy

    def infer(self, observation: Observation, noise: Tensor) -> np.ndarray:
        actions = self._postprocessor(self._sample(observation, noise))
        if not actions.isfinite().all():
            raise ValueError(f"policy {self.label!r} returned actions with NaN or infinity")
        return actions.float().numpy()

    def denoise(self, observation: Observation, noise: Tensor) -> Tensor:
        last = self._sample(observation, noise)
        padding = noise.shape[-1] - last.shape[-1]
        return torch.stack([*self._partial[1:], nn.functional.pad(last, (0, padding))])

    def resident_bytes(self) -> int:
        tensors = [*self.module.parameters(), *self.module.buffers()]
        operands = sum(m.operand_bytes() for m in self.module.modules() if isinstance(m, QuantizedLinear))
        return operands + sum(tensor.nbytes for tensor in tensors if tensor.device.type != "meta")

    def sites(self) -> list[InputSite]:
        return [site for block in self.blocks() for site in block.sites()]

    def differentiable_actions(self, observation: Observation, noise: Tensor) -> Tensor:
        self._partial.clear()
        predict = inspect.unwrap(type(self.module).predict_action_chunk)  # what it does beneath `torch.no_grad`
        return predict(self.module, self._preprocessor(self._batch(observation)), noise=noise)

    def kept_because(self, linear: str) -> str:
        for pattern, reason in self.kept.items():
            if re.search(pattern, linear):
                return reason
        raise KeyError(f"the {self.family} adapter does not know the linear layer {linear}")

    def stored_tensors(self) -> dict[str, Tensor]:
        return _read_weights(self.directory)

    def support_files(self) -> dict[str, Path]:
        files = {path for pattern in self.files for path in self.directory.glob(pattern) if path.is_file()}
        return {str(path.relative_to(self.directory)): path for path in sorted(files)}

    def _step(self, **arguments: Any) -> Tensor:
        time = float(arguments["timestep"].flatten()[0])
        self._partial.append(arguments["x_t"])
        with self.step.at(round((1 - time) * self.denoising_steps)):
            return self._denoise_step(**arguments)

    @torch.no_grad()
    def _sample(self, observation: Observation, noise: Tensor) -> Tensor:
        expected = (len(observation), *self.noise_shape)
        if tuple(noise.shape) != expected:
            raise ValueError(f"noise has shape {list(noise.shape)} instead of {list(expected)}")
        self._partial.clear()
        return self.module.predict_action_chunk(self._preprocessor(self._batch(observation)), noise=noise)

    def _batch(self, observation: Observation) -> dict[str, Any]:
        if missing := [camera for camera in self._cameras if camera not in observation.images]:
            raise ValueError(
                f"camera {missing[0]!r} is missing; the policy was trained with {', '.join(self._cameras)}"
            )
        if not np.isfinite(observation.state).all():  # it would be binned as if it were a number
            raise ValueError("the observation's state contains NaN or infinity")
        batch: dict[str, Any] = {OBS_STATE: torch.from_numpy(observation.state)}
        for camera in self._cameras:
            image = torch.from_numpy(observation.images[camera]).permute(0, 3, 1, 2)
            batch[f"{OBS_IMAGES}.{camera}"] = image.float() / 255
        return batch | {"task": list(observation.instructions)}

    @classmethod
    def _config(cls, directory: Path) -> PreTrainedConfig:
        config = PreTrainedConfig.from_pretrained(directory, local_files_only=True)
        if config.type != cls.family:
            raise CheckpointError(f"{directory / 'config.json'} is of type {config.type!r} instead of {cls.family!r}")
        config.device = "cpu"
        config.compile_model = False  # what it would compile is replaced here
        return config

    @classmethod
    def _without_values(cls, directory: Path) -> PreTrainedPolicy:
        """The module with its parameters on the meta device."""
        config = cls._config(directory)
        config.device = None  # lerobot then moves nothing: parameters without values cannot be moved
        with init_empty_weights(include_buffers=False):
            module = cls.build(config, directory)
        config.device = "cpu"
        return module

    @classmethod
    def _load_strictly(
        cls, module: nn.Module, tensors: Mapping[str, Tensor], path: Path, *, assign: bool = False
    ) -> None:
        """Copy (or assign, in the module's dtype) every tensor; raises `CheckpointError` that names what does not
        fit."""
        copies = {name: tensors[source] for name, source in cls.copies.items() if source in tensors}
        tensors, expected = copies | dict(tensors), module.state_dict()
        if missing := sorted(set(expected) - set(tensors)):
            raise CheckpointError(f"{path} lacks {missing[0]} and {len(missing) - 1} other tensors of the policy")
        if unknown := sorted(set(tensors) - set(expected)):
            raise CheckpointError(
                f"{path} holds {unknown[0]} and {len(unknown) - 1} other tensors unknown to the policy"
            )
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                wanted = list(expected[name].shape)
                raise CheckpointError(f"{path}: {name} has shape {list(tensor.shape)} instead of {wanted}")
            if not tensor.isfinite().all():
                raise CheckpointError(f"{path}: {name} contains NaN or infinity")
        if assign:
            tensors = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
        module.load_state_dict(tensors, strict=True, assign=assign)


def _read_weights(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from error


def _processors(config: PreTrainedConfig, directory: Path) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """The checkpoint's pre- and postprocessor; a tokenizer that lies beside them is used instead of a hub's."""
    overrides: dict[str, Any] = {"device_processor": {"device": "cpu"}}
    if (directory / "tokenizer").is_dir():
        overrides["tokenizer_processor"] = {"tokenizer_name": str(directory / "tokenizer")}
    return make_pre_post_processors(config, str(directory), preprocessor_overrides=overrides)
