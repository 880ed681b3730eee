"""What a `config.json` says of a quantized checkpoint, in the terms that other tools use for theirs."""

from __future__ import annotations

from typing import Any

from omega_qvla.pack.manifest import FORMAT, Plan
from omega_qvla.spec import LinearSpec


def quantization_config(plan: Plan) -> dict[str, Any]:
    """`quant_method`, `bits`, groups of linears that are quantized alike, and the linears to `ignore`.

    The keys are those of the configurations that transformers and compressed-tensors write. `bits` is the width of
    the weights' codes; a list where groups differ, null where output channels have widths of their own. It is a
    summary: the manifest holds the plan.
    """
    groups: dict[int, tuple[LinearSpec, list[str]]] = {}
    for site in plan.sites:
        groups.setdefault(site.rule, (plan.spec(site), []))[1].extend(site.linears)
    widths = list(dict.fromkeys(_bits(spec) for spec, _ in groups.values()))
    return {
        "quant_method": FORMAT,
        "recipe": plan.recipe.name,
        "execution": plan.recipe.execution,
        "bits": widths[0] if len(widths) == 1 else widths,
        "config_groups": {f"rule_{rule}": _group(*group) for rule, group in groups.items()},
        "ignore": [linear.name for linear in plan.linears if linear.site is None],
    }


def _bits(spec: LinearSpec) -> int | None:
    return None if spec.weight.allocation is not None else spec.weight.bits


def _group(spec: LinearSpec, linears: list[str]) -> dict[str, Any]:
    weight, activation = spec.weight, spec.activation
    weights = {
        "num_bits": _bits(spec),
        "type": "int",
        "symmetric": True,
        "strategy": "group" if weight.group_size is not None else "channel",
        "group_size": weight.group_size,
    }
    inputs = {
        "num_bits": activation.bits,
        "type": "int",
        "symmetric": True,
        "strategy": activation.granularity,
        "group_size": activation.group_size,
        "dynamic": activation.mode == "dynamic",
    }
    return {"targets": linears, "weights": weights, "input_activations": inputs if activation.rounds else None}
