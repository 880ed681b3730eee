"""The pipelines around a policy that was not opened by `--policy.path`."""

from __future__ import annotations

from typing import Any

from lerobot.lerobot_types import PolicyAction
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.converters import (
    batch_to_transition,
    policy_action_to_transition,
    transition_to_batch,
    transition_to_policy_action,
)

from omega_qvla.lerobot_plugin.configuration_omega_qvla import OmegaQVLAConfig
from omega_qvla.policies.lerobot_directory import PROCESSORS


def make_omega_qvla_pre_post_processors(
    config: OmegaQVLAConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]:
    """The pipelines that a quantized checkpoint has in its directory.

    `dataset_stats` have no meaning here: the policy normalizes as it was trained.
    """
    before, after = PROCESSORS["policy_preprocessor"], PROCESSORS["policy_postprocessor"]
    return (
        PolicyProcessorPipeline.from_config(before, to_transition=batch_to_transition, to_output=transition_to_batch),
        PolicyProcessorPipeline.from_config(
            after, to_transition=policy_action_to_transition, to_output=transition_to_policy_action
        ),
    )
