"""The verbs for a module that its user builds and runs: make a quantized checkpoint of it, and load one into it.

They need no model library; `docs/families/openvla.md` shows them on OpenVLA.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from omega_qvla.api import CalibrationSet, OnProgress, source_of, write_quantized
from omega_qvla.pack.manifest import CheckpointError, Manifest
from omega_qvla.policies.load_into import load_into
from omega_qvla.policies.named_module import DifferentiableActions, Infer, NamedModulePolicy
from omega_qvla.policies.targets import Target, TargetError, read_target
from omega_qvla.spec import Recipe, read_recipe

__all__ = ["load_into", "quantize_module"]


def quantize_module(
    module: nn.Module,
    target: Target | str | Path,
    recipe: Recipe | str | Path,
    out: Path,
    *,
    source: Path,
    infer: Infer,
    calibration: CalibrationSet | None = None,
    differentiable_actions: DifferentiableActions | None = None,
    on_progress: OnProgress = lambda what, share: None,
) -> Manifest:
    """Quantize a module into the new checkpoint directory `out`; returns the manifest written.

    `source`: the directory from which the module was loaded. Its files are named in the manifest, and those that
    are no weights become part of the checkpoint. `infer` runs the module on observations; `calibration` may be left
    out for recipes that need none, `differentiable_actions` for recipes that allocate no bits.

    Rules of the recipe for parts that the target does not have are left out. The module keeps its weights; it is
    put into evaluation mode.

    Raises `TargetError` if the module does not fit the target, `CheckpointError`, `RecipeError` or
    `CalibrationError` as `omega_qvla.quantize` does; then `out` does not exist.
    """
    target = target if isinstance(target, Target) else read_target(target)
    recipe = target.narrowed(recipe if isinstance(recipe, Recipe) else read_recipe(recipe))
    if out.exists():
        raise CheckpointError(f"{out} already exists; choose another directory or remove it")
    if not source.is_dir():
        raise CheckpointError(f"there is no directory {source}; give the one that the module was loaded from")
    if elsewhere := {str(tensor.device) for tensor in module.state_dict().values()} - {"cpu"}:
        raise TargetError(f"the module is on {min(elsewhere)}; modules are quantized on the CPU, move it there")
    policy = NamedModulePolicy(module, target, source, infer, differentiable_actions=differentiable_actions)
    if _allocates(recipe):
        policy.gradients()  # asked for now, not when all statistics have been taken
    return write_quantized(
        policy, recipe, out, source=source_of(source), calibration=calibration, on_progress=on_progress
    )


def _allocates(recipe: Recipe) -> bool:
    specs = [rule.quantize for rule in recipe.rules if rule.quantize is not None]
    return any(spec.weight.allocation is not None for spec in specs)
