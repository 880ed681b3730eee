"""A recipe resolved to every linear of a policy.

A plan is total: each linear is quantized in a site, or kept for a stated reason. What does not resolve is an
error before anything is computed.
"""

from __future__ import annotations

import re

from torch import nn

from omega_qvla.pack.manifest import Plan, PlannedLinear, PlannedSite
from omega_qvla.policy import InputSite, QuantizablePolicy
from omega_qvla.quantization.reconstruction import check_learnable
from omega_qvla.spec import LinearSpec, Recipe, RecipeError


def build_plan(recipe: Recipe, policy: QuantizablePolicy) -> Plan:
    """Raises `RecipeError` for a rule that matches nothing, a layer that no rule decides about, or sizes that do
    not fit the layer."""
    linears = {name: m for name, m in policy.module.named_modules() if isinstance(m, nn.Linear)}
    sites: list[PlannedSite] = []
    planned: dict[str, PlannedLinear] = {}
    used: set[int] = set()
    for site in policy.sites():
        decided = {name: _decide(recipe, site, name) for name in site.linears}
        used |= set(decided.values())
        for rule in sorted(set(decided.values())):
            names = tuple(name for name in site.linears if decided[name] == rule)
            reads = linears[names[0]].in_features
            spec = recipe.rules[rule].quantize
            if spec is None:
                kept = recipe.rules[rule].keep
                planned |= {name: _planned(name, linears[name], site, None, kept) for name in names}
                continue
            for site_name, members in _split(site, names, spec):
                _check_fit(spec, site, site_name, reads, {name: linears[name].out_features for name in members})
                sites.append(PlannedSite(site_name, site.part, site.block, reads, members, rule))
                planned |= {name: _planned(name, linears[name], site, site_name, None) for name in members}
    if unused := set(range(len(recipe.rules))) - used:
        rule_text = recipe.rules[min(unused)]
        raise RecipeError(
            f"rule {min(unused)} of recipe {recipe.name!r} (part {rule_text.part!r}, match {rule_text.match!r}) "
            "matches no linear of this policy; correct or remove it"
        )
    for name in linears.keys() - planned.keys():
        planned[name] = _planned(name, linears[name], None, None, policy.kept_because(name))
    return Plan(recipe, tuple(sites), tuple(planned[name] for name in linears))


def _decide(recipe: Recipe, site: InputSite, name: str) -> int:
    for index, rule in enumerate(recipe.rules):
        if rule.part == site.part and re.search(rule.match, name):
            return index
    raise RecipeError(f"no rule of recipe {recipe.name!r} decides about {name}; add one that quantizes or keeps it")


def _split(site: InputSite, names: tuple[str, ...], spec: LinearSpec) -> list[tuple[str, tuple[str, ...]]]:
    """One site for all linears that share a transform, or one for each.

    A site that several rules share out is named after the first linear of each share.
    """
    if spec.transform.sharing == "site":
        return [(site.name if names == site.linears else f"{names[0]}.input", names)]
    return [(f"{name}.input", (name,)) for name in names]


def _planned(
    name: str, linear: nn.Linear, site: InputSite | None, site_name: str | None, kept: str | None
) -> PlannedLinear:
    part = None if site is None else site.part
    return PlannedLinear(name, linear.in_features, linear.out_features, part, site_name, kept)


def _check_fit(spec: LinearSpec, site: InputSite, name: str, width: int, outputs: dict[str, int]) -> None:
    if spec.activation.rounds and spec.activation.mode == "per_step" and site.part != "action":
        raise RecipeError(f"{name} does not run in denoising steps: activation mode 'per_step' is for part 'action'")
    check_learnable(name, spec)
    transform, block = spec.transform, spec.transform.block_size
    blocked = transform.permutation != "none" or {transform.rotation, transform.first_rotation} != {"none"}
    sizes = {
        "transform.block_size": block if blocked else None,
        "weight.group_size": spec.weight.group_size,
        "activation.group_size": spec.activation.group_size,
    }
    for key, size in sizes.items():
        if size is not None and (size < 1 or width % size):
            raise RecipeError(
                f"{key} = {size} does not divide the {width} inputs of {name}; {width & -width} is the largest power "
                "of two that does"
            )
    rotations = transform.first_rotation, transform.rotation, transform.output_rotation
    if any("hadamard" in rotation for rotation in rotations) and block & (block - 1):
        raise RecipeError(f"transform.block_size = {block} is no power of two, as a Hadamard matrix needs")
    for linear, out in outputs.items():
        if transform.output_rotation != "none" and out % min(block, out):
            raise RecipeError(f"transform.block_size = {block} does not divide the {out} outputs of {linear}")
        if spec.weight.rank > min(width, out):
            raise RecipeError(f"weight.rank = {spec.weight.rank} is more than {linear} [{out}, {width}] has")
        if spec.weight.mixed and width % 4:
            raise RecipeError(f"the {width} inputs of {linear} do not fill whole bytes at 2 bits")
