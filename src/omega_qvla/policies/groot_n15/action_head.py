"""The action head of GR00T N1.5 (NVIDIA 2025, arXiv 2503.14734): flow matching from noise to a chunk of actions.

Every embodiment has its own encoders of state and actions and its own decoder; the diffusion transformer between them
is common to all. It sees the tokens of state, future and actions, in this order. Future tokens are learned vectors
that training aligned with future images (FLARE, arXiv 2505.15659).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omega_qvla.policies.groot_n15.architecture import ActionHeadSize
from omega_qvla.policies.groot_n15.transformer import (
    LONGEST_PERIOD,
    DiffusionTransformer,
    SelfAttentionTransformer,
)


@dataclass(frozen=True)
class Condition:
    """What all denoising steps of one inference share."""

    features: Tensor
    """Of vision and language, [B, L, width]"""
    mask: Tensor
    """bool [B, L], False for padding"""
    state: Tensor
    """Tokens of the state, [B, T, width]"""
    embodiment: Tensor
    """int64 [B]"""


class EmbodimentLinear(nn.Module):
    """One linear layer for every embodiment."""

    def __init__(self, embodiments: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(embodiments, in_features, out_features))
        self.b = nn.Parameter(torch.zeros(embodiments, out_features))
        nn.init.normal_(self.W, std=0.02)

    def forward(self, x: Tensor, embodiment: Tensor) -> Tensor:
        """[B, tokens, out] of x [B, tokens, in]; `embodiment` is int64 [B]."""
        return torch.bmm(x, self.W[embodiment]) + self.b[embodiment][:, None]


class EmbodimentMLP(nn.Module):
    """Two linear layers with a ReLU between them, for every embodiment."""

    def __init__(self, embodiments: int, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.layer1 = EmbodimentLinear(embodiments, in_features, hidden)
        self.layer2 = EmbodimentLinear(embodiments, hidden, out_features)

    def forward(self, x: Tensor, embodiment: Tensor) -> Tensor:
        return self.layer2(F.relu(self.layer1(x, embodiment)), embodiment)


class ActionEncoder(nn.Module):
    """Tokens of partly denoised actions, which know the timestep."""

    def __init__(self, embodiments: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.W1 = EmbodimentLinear(embodiments, action_dim, width)
        self.W2 = EmbodimentLinear(embodiments, 2 * width, width)
        self.W3 = EmbodimentLinear(embodiments, width, width)

    def forward(self, actions: Tensor, timestep: Tensor, embodiment: Tensor) -> Tensor:
        """[B, horizon, width] of actions [B, horizon, action dimension]; `timestep` is int64 [B], a bucket."""
        tokens = self.W1(actions, embodiment)
        count = tokens.shape[-1] // 2
        channels = torch.arange(count, dtype=torch.float32, device=actions.device)
        angles = timestep.float()[:, None] * (-channels * (math.log(LONGEST_PERIOD) / count)).exp()
        time = torch.cat([angles.sin(), angles.cos()], dim=-1).to(tokens.dtype)
        joined = torch.cat([tokens, time[:, None].expand_as(tokens)], dim=-1)
        return self.W3(F.silu(self.W2(joined, embodiment)), embodiment)


class ActionHead(nn.Module):
    """From the features of vision and language, the state and noise to actions."""

    def __init__(self, size: ActionHeadSize) -> None:
        super().__init__()
        embodiments, width = size.max_num_embodiments, size.input_embedding_dim
        self.action_dim, self.action_horizon = size.action_dim, size.action_horizon
        self.timestep_buckets = size.num_timestep_buckets
        self.denoising_steps = size.num_inference_timesteps
        self.vlln = nn.LayerNorm(size.backbone_embedding_dim)
        self.vl_self_attention = SelfAttentionTransformer(size.vl_self_attention_cfg)
        self.state_encoder = EmbodimentMLP(embodiments, size.max_state_dim, size.hidden_size, width)
        self.action_encoder = ActionEncoder(embodiments, size.action_dim, width)
        self.position_embedding = nn.Embedding(size.max_seq_len, width)
        self.future_tokens = nn.Embedding(size.num_target_vision_tokens, width)
        self.model = DiffusionTransformer(size.diffusion_model_cfg)
        self.action_decoder = EmbodimentMLP(embodiments, size.hidden_size, size.hidden_size, size.action_dim)

    def condition(self, features: Tensor, mask: Tensor, state: Tensor, embodiment: Tensor) -> Condition:
        """Everything that is computed once per inference.

        `features` is [B, L, width of the backbone], `mask` bool [B, L], `state` [B, T, state dimension], normalized
        and padded with zeros, `embodiment` int64 [B].
        """
        dtype = self.vlln.weight.dtype
        attended = self.vl_self_attention(self.vlln(features.to(dtype)), mask)
        return Condition(attended, mask, self.state_encoder(state.to(dtype), embodiment), embodiment)

    def sample(self, condition: Condition, noise: Tensor) -> Tensor:
        """Actions [B, horizon, action dimension] from noise of this shape, by Euler steps along the velocity."""
        actions, duration = noise.to(condition.state.dtype), 1 / self.denoising_steps
        for step in range(self.denoising_steps):
            velocity = self.denoise_step(actions=actions, step=step, condition=condition)
            actions = actions + duration * velocity
        return actions

    def denoise_step(self, *, actions: Tensor, step: int, condition: Condition) -> Tensor:
        """The velocity [B, horizon, action dimension] of partly denoised actions at a step, 0 for pure noise.

        `sample` looks this method up on the instance for every step, so that it can be wrapped there.
        """
        # Rounded down, and in this order of operations, as in training.
        bucket = int(step / self.denoising_steps * self.timestep_buckets)
        timestep = torch.full((len(actions),), bucket, device=actions.device)
        tokens = self.action_encoder(actions, timestep, condition.embodiment)
        tokens = tokens + self.position_embedding.weight[: self.action_horizon]
        future = self.future_tokens.weight.expand(len(actions), -1, -1)
        joined = torch.cat([condition.state, future, tokens], dim=1)
        hidden = self.model(joined, timestep, condition.features, condition.mask)
        return self.action_decoder(hidden[:, -self.action_horizon :], condition.embodiment)
