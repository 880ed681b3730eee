"""A quantized checkpoint put into a module that its user has built."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from omega_qvla.pack.checkpoint import KEPT_FILE, Checkpoint, read
from omega_qvla.pack.manifest import CheckpointError, Manifest
from omega_qvla.policies.assigning import fitting
from omega_qvla.policies.named_module import fit
from omega_qvla.policies.targets import Target, read_target
from omega_qvla.runtime import DenoisingStep, install
from omega_qvla.runtime.linear import Execution


def load_into(
    module: nn.Module, target: Target | str | Path, directory: Path, execution: Execution = "integer"
) -> Manifest:
    """Replace the linears of `module` that a checkpoint quantizes and set every other tensor; returns its manifest.

    The module has its architecture, dtypes and any weights, on the CPU or, to save memory, the meta device (all
    parameters; buffers that no checkpoint stores must have their values). It is put into evaluation mode.

    `execution` holds for the linears whose scales an integer product can apply; the others are simulated.

    Raises `CheckpointError` if anything in the checkpoint is damaged, or of another target or module, `TargetError`
    if the module does not fit the target; then the module is as it was.
    """
    target = target if isinstance(target, Target) else read_target(target)
    checkpoint = read(Path(directory))
    family = checkpoint.manifest.family
    if family != target.name:
        raise CheckpointError(f"{directory} holds a policy of family {family!r}, not of target {target.name!r}")
    fit(module, target)
    if elsewhere := {tensor.device.type for tensor in module.state_dict().values()} - {"cpu", "meta"}:
        raise CheckpointError(f"the module is on {min(elsewhere)}; quantized linears run on the CPU, build it there")
    _check_linears(module, checkpoint)
    kept = _fitting(module, checkpoint)
    install(module, checkpoint.sites, DenoisingStep(checkpoint.manifest.denoising_steps), execution)
    module.load_state_dict(kept, strict=True, assign=True)
    module.eval()
    return checkpoint.manifest


def _check_linears(module: nn.Module, checkpoint: Checkpoint) -> None:
    planned = {each.name: [each.out_features, each.in_features] for each in checkpoint.manifest.plan.linears}
    linears = {name: found for name, found in module.named_modules() if isinstance(found, nn.Linear)}
    if differing := planned.keys() ^ linears.keys():
        name = min(differing)
        where = ("the module", "the checkpoint") if name in planned else ("the checkpoint", "the module")
        raise CheckpointError(
            f"{checkpoint.directory} does not fit the module: {where[0]} lacks the linear {name} of {where[1]}; "
            "build it with everything that it had when it was quantized, and nothing else"
        )
    for name, shape in planned.items():
        if (found := list(linears[name].weight.shape)) != shape:
            raise CheckpointError(f"{checkpoint.directory}: {name} has shape {shape}, in the module it has {found}")


def _fitting(module: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The checkpoint's floating-point tensors, in the module's dtypes."""
    quantized = [each.name for each in checkpoint.manifest.plan.linears if each.site is not None]
    replaced = {f"{name}.{leaf}" for name in quantized for leaf in ("weight", "bias")}
    expected = {name: tensor for name, tensor in module.state_dict().items() if name not in replaced}
    return fitting(expected, checkpoint.kept, checkpoint.directory / KEPT_FILE)
