"""A policy of ours as a policy of lerobot: a queue of actions around `Policy.infer`."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from omega_qvla.evaluation.seeds import noise_of
from omega_qvla.lerobot_plugin.configuration_omega_qvla import OmegaQVLAConfig, check_device, refuse_training
from omega_qvla.lerobot_plugin.episode_key import BATCH_KEY, from_batch
from omega_qvla.policies import open_or_load
from omega_qvla.policies.cameras import features_of_cameras, holds_images
from omega_qvla.policies.lerobot_policy import LerobotPolicy
from omega_qvla.policy import Observation, PreviousChunk


class OmegaQVLAPolicy(PreTrainedPolicy):
    """A quantized policy, or one in floating point; whatever `omega_qvla.load` opens.

    Observations come as lerobot's environments and robots deliver them, and actions leave in physical units: the
    policy's own processors run inside. Noise comes from torch's global generator, as for lerobot's policies, but for
    episodes that the environment names (`episode_key`): those meet the noise of `omega-qvla evaluate`.
    """

    config_class = OmegaQVLAConfig
    name = "omega_qvla"

    def __init__(self, config: OmegaQVLAConfig, **_: Any) -> None:
        """`config.checkpoint` names the directory. What else lerobot offers, such as a dataset's statistics, is not
        needed.

        Raises `CheckpointError` as `omega_qvla.load` does, `ValueError` if no directory is named, or if the robot
        takes actions of another dimension.
        """
        super().__init__(config)
        if config.checkpoint is None:
            raise ValueError("there is no policy to open; name one with --policy.path=DIR or --policy.checkpoint=DIR")
        self.policy = open_or_load(Path(config.checkpoint), config.execution)
        self._steps = config.n_action_steps or self.policy.execute_steps
        width, feature = self.policy.interface().action_width, config.action_feature
        if feature is not None and tuple(feature.shape) != (width,):
            raise ValueError(f"the policy gives actions of {width} numbers, the robot takes {list(feature.shape)}")
        self.eval()
        self.reset()
        self.init_rtc_processor()

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **_: Any
    ) -> Self:
        """The policy in a directory, loaded strictly: everything in it is compared with its manifest.

        What lerobot says about downloads is not needed. Raises `FileNotFoundError` if there is no such directory,
        otherwise as the constructor does.
        """
        directory = Path(pretrained_name_or_path)
        if not directory.is_dir():
            raise FileNotFoundError(
                f"there is no directory {directory}; fetch the policy with `omega-qvla pull {directory} DIR`"
            )
        config = config or PreTrainedConfig.from_pretrained(directory)
        if not isinstance(config, OmegaQVLAConfig):
            raise ValueError(
                f"{directory} is of lerobot's type {config.type!r}; let lerobot open it, or pass "
                f"--policy.type={cls.name} --policy.checkpoint={directory}"
            )
        config.checkpoint = str(directory)
        return cls(config)

    def reset(self) -> None:
        """Forget planned actions: episodes begin."""
        self._planned: deque[Tensor] = deque(maxlen=self._steps)
        self._inferences = 0

    def supports_rtc(self) -> bool:
        """Whether it continues previous chunks."""
        return self.policy.interface().previous_actions > 0

    def init_rtc_processor(self) -> None:
        """Do real-time chunking as `config.rtc_config` says, which lerobot may have set anew."""
        if self.config.rtc_config is not None and isinstance(self.policy, LerobotPolicy):
            self.policy.chunking = self.config.rtc_config

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], noise: Tensor | None = None) -> Tensor:
        """The next action of B robots in physical units, float32 [B, D]. Every `n_action_steps` calls it infers."""
        if not self._planned:
            self._planned.extend(self.predict_action_chunk(batch, noise)[:, : self._steps].transpose(0, 1))
        return self._planned.popleft()

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        noise: Tensor | None = None,
        *,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
    ) -> Tensor:
        """Chunks of actions of B robots in physical units, float32 [B, chunk, D].

        `noise`: float32 [B, *noise_shape] instead of what is drawn. `prev_chunk_left_over`: in physical units,
        [B, T, D], or [T, D] for all; see `omega_qvla.policy.PreviousChunk`. Raises `ValueError` if an observation
        lacks what the policy was trained with, if more actions shall be executed than a chunk has, or if the policy
        cannot continue the previous chunk.
        """
        observation = _observation(batch)
        if noise is None:
            noise = self._noise(batch, len(observation))
        self._inferences += 1
        previous = None
        if prev_chunk_left_over is not None and (self.config.rtc_config is None or self.config.rtc_config.enabled):
            left_over = prev_chunk_left_over.expand(len(observation), -1, -1)
            previous = _previous(left_over, inference_delay or 0, execution_horizon)
        actions = torch.from_numpy(self.policy.infer(observation, noise.cpu(), previous))
        if actions.shape[1] < self._steps:
            raise ValueError(f"n_action_steps is {self._steps}, but a chunk has {actions.shape[1]} actions")
        return actions

    def to(self, *arguments: Any, **named: Any) -> Self:
        """Raises `ValueError` for a device other than the CPU; what it is computed in is part of the checkpoint."""
        device = named.get("device", arguments[0] if arguments else None)
        if isinstance(device, str | torch.device):
            check_device(device)
        return self

    def forward(self, batch: dict[str, Any]) -> NoReturn:
        """Raises `NotImplementedError`, as it is for training."""
        refuse_training()

    def get_optim_params(self) -> NoReturn:
        """Raises `NotImplementedError`, as it is for training."""
        refuse_training()

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Raises `NotImplementedError`: a checkpoint is complete as it is."""
        raise NotImplementedError(f"the policy is saved already; copy the directory {self.config.checkpoint}")

    def _noise(self, batch: dict[str, Any], size: int) -> Tensor:
        shape = self.policy.noise_shape
        if BATCH_KEY not in batch:
            return torch.normal(0.0, 1.0, (size, *shape), dtype=torch.float32)
        keys = from_batch(batch[BATCH_KEY])
        return torch.from_numpy(np.stack([noise_of(key, self._inferences, shape) for key in keys]))


def _observation(batch: dict[str, Any]) -> Observation:
    """Raises `ValueError` if the state or the instruction is missing."""
    if OBS_STATE not in batch:
        raise ValueError(f"the observation has no {OBS_STATE}")
    state = batch[OBS_STATE].cpu().float().numpy()
    instructions = batch.get("task")
    if not isinstance(instructions, list) or len(instructions) != len(state):
        raise ValueError(f"the observation has {instructions!r} as task instead of {len(state)} sentences")
    features = features_of_cameras(filter(holds_images, batch))
    images = {camera: _pixels(feature, batch[feature]) for camera, feature in features.items()}
    return Observation(images, state, tuple(instructions))


def _previous(left_over: Tensor, delay: int, execution_horizon: int | None) -> PreviousChunk | None:
    """None if nothing is left of float32 [B, T, D]. lerobot fills it up with zeros, to which nothing shall be drawn,
    and foresees delays beyond its end, where the robot waits."""
    filled = left_over.abs().sum((0, 2)).nonzero()
    if not len(filled):
        return None
    actions = left_over[:, : int(filled[-1]) + 1].float().cpu().contiguous().numpy()
    return PreviousChunk(actions, min(delay, actions.shape[1]), execution_horizon)


def _pixels(key: str, image: Tensor) -> np.ndarray:
    """uint8 [B, H, W, 3] as the camera gave it, from lerobot's float32 [B, 3, H, W] in [0, 1]."""
    low, high = image.aminmax()
    if not (low >= 0 and high <= 1):  # also if there is a NaN
        raise ValueError(f"{key} has values from {float(low)} to {float(high)} instead of 0 to 1")
    return (image.cpu() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
