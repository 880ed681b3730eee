"""What lerobot's flow-matching policies have in common, from the configuration to actions.

A family is a subclass: it builds lerobot's module and says what its parts are. The denoising loop, one function
for all families (`lerobot.policies.common.flow_matching`), looks `denoise_step` up on the instance for every step,
so that is where the step is known.

A chunk continues a previous one as in lerobot's real-time chunking (`lerobot.policies.rtc`): every denoising step is
drawn to what is left of that chunk, as if the network's estimate moved one to one with the noisy chunk. So nothing
is differentiated, and the network may consist of integers.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from draccus.utils import DecodingError
from lerobot.configs import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.rtc import RTCConfig
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStep,
    RelativeActionsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from torch import Tensor

from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.base import AdaptedPolicy
from omega_qvla.policies.cameras import features_of_cameras
from omega_qvla.policy import Interface, Observation, PreviousChunk

_LIMITS = {
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}
"""The statistics that a normalization maps to -1 and 1; there is no such pair for mean and deviation."""


class LerobotPolicy(AdaptedPolicy):
    """A policy of lerobot, in floating point or quantized; a family implements `build` and `blocks`.

    `family` is lerobot's name for it, the `type` in `config.json`.
    """

    module: PreTrainedPolicy
    steps_setting: str = "num_inference_steps"
    """Where its configuration says the number of denoising steps."""
    files: tuple[str, ...] = ("config.json", "policy_*", "tokenizer/*")
    undone_by: Mapping[type[ProcessorStep], type[ProcessorStep]] = {
        UnnormalizerProcessorStep: NormalizerProcessorStep,
        AbsoluteActionsProcessorStep: RelativeActionsProcessorStep,
    }
    """What of the preprocessor undoes what the postprocessor does to actions."""

    @classmethod
    @abstractmethod
    def build(cls, config: PreTrainedConfig, directory: Path) -> PreTrainedPolicy:
        """lerobot's module for the checkpoint in `directory`, with any weights, in the dtypes in which it runs.

        Raises `CheckpointError` for a configuration that is not supported.
        """

    def __init__(self, module: PreTrainedPolicy, directory: Path, label: str, execution: str) -> None:
        super().__init__(module, directory, label, execution)
        self.noise_shape, self.execute_steps = self.sizes(module)
        self._preprocessor, self._postprocessor = self.processors(module.config, directory)
        self._cameras = self.cameras(module.config, directory)
        self._recording = False
        self.chunking = getattr(module.config, "rtc_config", None) or self.default_chunking()
        self.follow(module)

    def steps(self, module: PreTrainedPolicy) -> int:
        return getattr(module.config, self.steps_setting)

    def sizes(self, module: PreTrainedPolicy) -> tuple[tuple[int, int], int]:
        """The shape of one observation's noise, and how many actions of a chunk are executed."""
        config = module.config
        return (config.chunk_size, config.max_action_dim), config.n_action_steps

    @property
    def chunking(self) -> RTCConfig:
        """How a chunk continues a previous one: as the checkpoint's `rtc_config` says, else by default."""
        return self.module.config.rtc_config

    @chunking.setter
    def chunking(self, settings: RTCConfig) -> None:
        self.module.config.rtc_config = settings
        self.module.init_rtc_processor()

    def default_chunking(self) -> RTCConfig:
        """lerobot's, but the first step, which goes weight / steps of the way, goes no further than all of it."""
        return RTCConfig(max_guidance_weight=min(RTCConfig.max_guidance_weight, float(self.denoising_steps)))

    def previous_actions(self) -> int:
        """How many actions of a previous chunk can be continued: none if it is switched off, or if actions cannot be
        brought back from physical units as the policy had them."""
        steps = [step for step in self._postprocessor.steps if not isinstance(step, DeviceProcessorStep)]
        can_return = all(
            kind is not None and any(isinstance(step, kind) for step in self._preprocessor.steps)
            for kind in (self.undone_by.get(type(step)) for step in steps)
        )
        return self.chunk(self.module) if self.chunking.enabled and can_return else 0

    def chunk(self, module: PreTrainedPolicy) -> int:
        """How many actions a chunk has."""
        return module.config.chunk_size

    def image_features(self, config: PreTrainedConfig) -> list[str]:
        """Those that an observation must have."""
        blank = {f"{OBS_IMAGES}.empty_camera_{i}" for i in range(config.empty_cameras)}
        return [feature for feature in config.image_features if feature not in blank]

    def cameras(self, config: PreTrainedConfig, directory: Path) -> dict[str, str]:
        """Camera to its feature. Raises `CheckpointError` if two features are of the same camera."""
        try:
            return features_of_cameras(self.image_features(config))
        except ValueError as error:
            raise CheckpointError(f"{directory / 'config.json'}: {error}") from error

    def interface(self) -> Interface:
        """As `config.json` states it. Raises `CheckpointError` if it states no state."""
        config = self.module.config
        if OBS_STATE not in config.input_features:
            raise CheckpointError(
                f"{self.directory / 'config.json'}: input_features lacks {OBS_STATE}; add its shape"
            )
        shapes = {name: config.input_features[feature].shape for name, feature in self._cameras.items()}
        return Interface(
            cameras={name: (height, width) for name, (_, height, width) in shapes.items()},
            state={"state": config.input_features[OBS_STATE].shape[0]},
            actions={"action": config.action_feature.shape[0]},
            previous_actions=self.previous_actions(),
        )

    def processors(
        self, config: PreTrainedConfig, directory: Path
    ) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
        """The checkpoint's pre- and postprocessor; a tokenizer that lies beside them is used instead of a hub's."""
        overrides: dict[str, Any] = {"device_processor": {"device": "cpu"}}
        if (directory / "tokenizer").is_dir():
            overrides["tokenizer_processor"] = {"tokenizer_name": str(directory / "tokenizer")}
        return make_pre_post_processors(config, str(directory), preprocessor_overrides=overrides)

    def follow(self, module: PreTrainedPolicy) -> None:
        """Attach to the denoising loop: tell `step` of every step, and record gradients if the caller does."""
        model = module.model
        self._denoise_step = model.denoise_step
        model.denoise_step = self._step
        # Without its `torch.no_grad`: whether gradients are recorded is decided by who calls.
        model.sample_actions = MethodType(inspect.unwrap(type(model).sample_actions), model)

    @classmethod
    def without_values(cls, directory: Path) -> PreTrainedPolicy:
        try:
            config = PreTrainedConfig.from_pretrained(directory, local_files_only=True)
        except (DecodingError, ValueError, TypeError) as error:
            raise CheckpointError(f"{directory / 'config.json'} is no configuration of lerobot: {error}") from error
        if config.type != cls.family:
            raise CheckpointError(f"{directory / 'config.json'} is of type {config.type!r} instead of {cls.family!r}")
        config.compile_model = False  # what it would compile is replaced here
        config.device = None  # lerobot then moves nothing: parameters without values cannot be moved
        with init_empty_weights(include_buffers=False):
            module = cls.build(config, directory)
        config.device = "cpu"
        return module

    def sample(self, observation: Observation, noise: Tensor) -> Tensor:
        return self._predict(self._preprocessor(self._batch(observation)), noise=noise)

    def sample_continuing(self, observation: Observation, noise: Tensor, previous: PreviousChunk) -> Tensor:
        batch, left_over = self._with_previous(observation, previous)
        return self._predict(
            batch,
            noise=noise,
            inference_delay=previous.delay,
            prev_chunk_left_over=left_over,
            execution_horizon=self._execution_horizon(previous),
        )

    def physical(self, actions: Tensor) -> Tensor:
        return self._postprocessor(actions)

    def action_bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        steps = self._postprocessor.steps
        if any(isinstance(step, AbsoluteActionsProcessorStep) and step.enabled for step in steps):
            return None
        for step in steps:
            if isinstance(step, UnnormalizerProcessorStep):
                ends = _LIMITS.get(step.norm_map.get(FeatureType.ACTION, NormalizationMode.IDENTITY))
                statistics = (step.stats or {}).get(ACTION, {})
                if ends is not None and statistics:
                    low, high = (np.asarray(statistics[end], dtype=np.float64) for end in ends)
                    return low, high
        return None

    def _step(self, **arguments: Any) -> Tensor:
        time = float(arguments["timestep"].flatten()[0])
        self.partial.append(arguments["x_t"])
        # lerobot's real-time chunking records gradients around a step, and uses none of the network's.
        with self.step.at(round((1 - time) * self.denoising_steps)), torch.set_grad_enabled(self._recording):
            return self._denoise_step(**arguments)

    def _predict(self, batch: dict[str, Any], **arguments: Any) -> Tensor:
        self._recording = torch.is_grad_enabled()
        predict = inspect.unwrap(type(self.module).predict_action_chunk)  # what it does beneath `torch.no_grad`
        return predict(self.module, batch, **arguments)

    def _with_previous(self, observation: Observation, previous: PreviousChunk) -> tuple[dict[str, Any], Tensor]:
        """What the preprocessor makes of both, as in training: actions normalized, relative ones to this state."""
        batch = self._preprocessor(self._batch(observation) | {ACTION: torch.tensor(previous.actions)})
        return batch, batch.pop(ACTION)

    def _execution_horizon(self, previous: PreviousChunk) -> int:
        if previous.execution_horizon is not None:
            return previous.execution_horizon
        return max(self.chunking.execution_horizon, previous.delay)

    def _batch(self, observation: Observation) -> dict[str, Any]:
        if missing := [camera for camera in self._cameras if camera not in observation.images]:
            raise ValueError(
                f"camera {missing[0]!r} is missing; the policy was trained with {', '.join(self._cameras)}"
            )
        batch: dict[str, Any] = {OBS_STATE: torch.from_numpy(observation.state)}
        for camera, feature in self._cameras.items():
            image = torch.from_numpy(observation.images[camera]).permute(0, 3, 1, 2)
            batch[feature] = image.float() / 255
        return batch | {"task": list(observation.instructions)}
