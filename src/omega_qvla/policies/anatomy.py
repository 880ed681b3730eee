"""The blocks of a policy and what their linears read, in the names that transformers gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from omega_qvla.policy import InputSite
from omega_qvla.spec import Part

Inputs = Mapping[str, tuple[str, ...]]
"""A name for each input of a block, in the order in which they are read: the linears that read it, as the block
calls them."""

ATTENTION_AND_GATED_MLP: Inputs = {
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
    "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_hidden": ("mlp.down_proj",),
}
"""Gemma and Llama."""
CROSS_ATTENTION_AND_GATED_MLP: Inputs = {
    "attention_input": ("self_attn.q_proj",),
    "cross_keys": ("self_attn.k_proj",),
    "cross_values": ("self_attn.v_proj",),
    "attention_output": ("self_attn.o_proj",),
    "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_hidden": ("mlp.down_proj",),
}
"""The same, attending to the cached keys and values of another stack: three inputs instead of one."""
VISION_ATTENTION_AND_MLP: Inputs = {
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.out_proj",),
    "mlp_input": ("mlp.fc1",),
    "mlp_hidden": ("mlp.fc2",),
}
"""SigLIP."""
SELF_ATTENTION: Inputs = {
    "attention_input": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention_output": ("attn1.to_out.0",),
    "mlp_input": ("ff.net.0.proj",),
    "mlp_hidden": ("ff.net.2",),
}
"""Layers of GR00T's diffusion transformer that attend to state and actions."""
CROSS_ATTENTION: Inputs = {
    "attention_input": ("attn1.to_q",),
    "cross_attention_input": ("attn1.to_k", "attn1.to_v"),
    "attention_output": ("attn1.to_out.0",),
    "mlp_input": ("ff.net.0.proj",),
    "mlp_hidden": ("ff.net.2",),
}
"""Those that attend to the tokens of vision and language."""
GROOT_ACTION_HEAD_KEPT: Mapping[str, str] = {
    r"action_head\.vl_self_attention\.": "refines what every layer of the DiT reads; outside the method's scope",
    r"transformer_blocks\.\d+\.norm1\.linear$": "modulates a norm from the denoising time; its output is a scale "
    "and a shift",
    r"action_head\.model\.timestep_encoder\.": "embeds the denoising time; small and sensitive",
    r"action_head\.model\.proj_out_1$": "modulates the last norm from the denoising time",
    r"action_head\.model\.proj_out_2$": "carries the actions to their decoder; small and sensitive",
}
"""Why linears of GR00T's action head stay in floating point, outside the blocks of its diffusion transformer."""
GROOT_ACTION_HEAD_OF_THE_STEP = (
    r"transformer_blocks\.\d+\.norm1\.linear$|timestep_encoder\.timestep_embedder\.linear_"
    r"|action_head\.model\.proj_out_1$"
)
"""Pattern of those that read nothing but the denoising time."""


@dataclass(frozen=True)
class Block:
    """One layer of a stack."""

    part: Part
    name: str
    inputs: Inputs

    def sites(self) -> list[InputSite]:
        """Its inputs under their full names, in the order in which they are read."""
        sites = []
        for name, leaves in self.inputs.items():
            linears = tuple(f"{self.name}.{leaf}" for leaf in leaves)
            sites.append(InputSite(f"{self.name}.{name}", self.part, self.name, linears))
        return sites


def stack(module: nn.Module, part: Part, layers: str, inputs: Inputs) -> list[Block]:
    """The blocks of the `ModuleList` called `layers`, all alike. Raises `AttributeError` if there is none."""
    return [Block(part, f"{layers}.{index}", inputs) for index in range(depth(module, layers))]


def depth(module: nn.Module, layers: str) -> int:
    """Length of the `ModuleList` called `layers`. Raises `AttributeError` if there is none."""
    found = module.get_submodule(layers)
    assert isinstance(found, nn.ModuleList)
    return len(found)
