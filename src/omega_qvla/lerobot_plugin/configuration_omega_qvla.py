"""What lerobot knows of our policies before it opens one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.rtc import RTCConfig

from omega_qvla.policies.lerobot_directory import LEROBOT_TYPE


@PreTrainedConfig.register_subclass(LEROBOT_TYPE)
@dataclass
class OmegaQVLAConfig(PreTrainedConfig):
    """The `config.json` of a quantized checkpoint, and what can be said about it on a command line.

    Raises `ValueError` for a device other than the CPU: packed weights are multiplied there.
    """

    device: str | None = "cpu"
    checkpoint: str | None = None
    """A directory to open instead of `--policy.path`: any that `omega_qvla.load` opens, also in floating point."""
    n_action_steps: int | None = None
    """How many actions of a chunk are executed before the next inference; None: as the policy was trained."""
    execution: Literal["integer", "simulated"] = "integer"
    """How linears run whose scales an integer product can apply."""
    rtc_config: RTCConfig | None = None
    """How a chunk continues the one before, which `lerobot-rollout` sets; None: as the policy's own configuration
    says."""
    quantization_config: dict[str, Any] = field(default_factory=dict)
    """A summary for readers; what is loaded follows the manifest."""

    def __post_init__(self) -> None:
        self.device = self.device or "cpu"
        check_device(self.device)
        super().__post_init__()
        if self.n_action_steps is not None and self.n_action_steps < 1:
            raise ValueError(f"n_action_steps is {self.n_action_steps}; it must be at least 1")

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> NoReturn:
        refuse_training()

    def get_scheduler_preset(self) -> NoReturn:
        refuse_training()

    def validate_features(self) -> None:
        """The policy itself checks what it is given."""


def check_device(device: str | torch.device) -> None:
    """Raises `ValueError` unless it is the CPU."""
    if torch.device(device).type != "cpu":
        raise ValueError(f"this policy runs on the CPU, not on {device}; set the device to cpu")


def refuse_training() -> NoReturn:
    """Raises `NotImplementedError`."""
    raise NotImplementedError(
        "a quantized policy cannot be trained; train the checkpoint that it was made from, then quantize that"
    )
