"""Recipes as data: what is quantized, how, and what is kept.

A recipe is a list of rules over the policy's linear layers. The first rule whose part and pattern match a
layer decides about it. Every method is a composition of the same few pieces, so a recipe is also the
complete description that a checkpoint carries.
"""

from omega_qvla.spec.gate import GateSpec
from omega_qvla.spec.linear import (
    CHANNEL_WIDTHS,
    ActivationSpec,
    AllocationSpec,
    Arithmetic,
    Bits,
    Codes,
    LinearSpec,
    Rotation,
    TransformSpec,
    WeightSpec,
)
from omega_qvla.spec.recipe import (
    CorrectionSpec,
    Part,
    Recipe,
    RecipeError,
    Rule,
    read_recipe,
    recipe_from_dict,
    recipe_names,
    recipe_to_dict,
)
from omega_qvla.spec.variants import Scope, recipe_as, scope_names, scope_summary, with_scope, with_settings

__all__ = [
    "CHANNEL_WIDTHS",
    "ActivationSpec",
    "AllocationSpec",
    "Arithmetic",
    "Bits",
    "Codes",
    "CorrectionSpec",
    "GateSpec",
    "LinearSpec",
    "Part",
    "Recipe",
    "RecipeError",
    "Rotation",
    "Rule",
    "Scope",
    "TransformSpec",
    "WeightSpec",
    "read_recipe",
    "recipe_as",
    "recipe_from_dict",
    "recipe_names",
    "recipe_to_dict",
    "scope_names",
    "scope_summary",
    "with_scope",
    "with_settings",
]
