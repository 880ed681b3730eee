"""Targets: which linears a model has, by name, for modules that their users build themselves."""

from omega_qvla.policies.targets.target import (
    Stack,
    Target,
    TargetError,
    read_target,
    target_from_dict,
    target_names,
)

__all__ = ["Stack", "Target", "TargetError", "read_target", "target_from_dict", "target_names"]
