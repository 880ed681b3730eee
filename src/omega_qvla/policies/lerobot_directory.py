"""What lerobot wants to find in a directory, so that a quantized checkpoint is one of its policies.

The policy's own configuration, processors and tokenizer stay in `policy/`, where only its adapter reads them: it
takes what the robot delivers and gives actions in physical units. So the processors that lerobot itself runs have
nothing left to do but to rename cameras, to make a batch of one observation, and to bring it where the policy is.
"""

from __future__ import annotations

import json
from typing import Any

from omega_qvla.pack.manifest import Plan
from omega_qvla.pack.quantization_config import quantization_config
from omega_qvla.policies.stored import read_json_object
from omega_qvla.policy import QuantizablePolicy

LEROBOT_TYPE = "omega_qvla"
"""The `type` of policy under which our plug-in is known to lerobot."""
LEROBOT_FAMILIES = ("pi05", "pi0", "smolvla", "groot")
"""Families whose policies the release of lerobot that we use has; others have no configuration that it could read."""

_TO_DEVICE = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
PROCESSORS: dict[str, dict[str, Any]] = {
    "policy_preprocessor": {
        "name": "policy_preprocessor",
        "steps": [
            {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
            {"registry_name": "to_batch_processor", "config": {}},
            _TO_DEVICE,
        ],
    },
    "policy_postprocessor": {"name": "policy_postprocessor", "steps": [_TO_DEVICE]},
}
"""lerobot's two pipelines around the policy, by the name that it gives them."""


def lerobot_files(policy: QuantizablePolicy, plan: Plan) -> dict[str, str]:
    """The texts of `config.json` and of both pipelines by file name; none for a family that lerobot does not know."""
    if policy.family not in LEROBOT_FAMILIES:
        return {}
    original = read_json_object(policy.support_files()["config.json"])
    config = {
        "type": LEROBOT_TYPE,
        "device": "cpu",
        "input_features": original["input_features"],
        "output_features": original["output_features"],
        "n_action_steps": policy.execute_steps,
        "quantization_config": quantization_config(plan),
    }
    documents = {"config.json": config} | {f"{name}.json": steps for name, steps in PROCESSORS.items()}
    return {name: json.dumps(document, indent=1) + "\n" for name, document in documents.items()}
