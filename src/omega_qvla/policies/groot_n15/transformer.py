"""The two transformers of the action head: over the features of vision and language, and the diffusion transformer
(Peebles & Xie 2023, arXiv 2212.09748) over state and actions, which attends to these features.

Parameters have the names that diffusers gives them, since the checkpoints have those.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omega_qvla.policies.groot_n15.architecture import DiffusionSize, SelfAttentionSize

LONGEST_PERIOD = 10_000.0
"""Of the sinusoidal embeddings of time, in units of 2π timesteps."""
_TIMESTEP_CHANNELS = 256


class Attention(nn.Module):
    """Multi-head attention of `width` channels, to themselves or to `context_width` others."""

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(context_width, width)
        self.to_v = nn.Linear(context_width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output [B, query, width] and weights after softmax [B, heads, query, key].

        `x` is [B, query, width], `context` [B, key, context width]; `mask` bool [B, key], False for keys that nothing
        may attend to.
        """
        query, key, value = (
            self._split(projected) for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -math.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        attended = (weights @ value).transpose(1, 2).flatten(2)
        return self.to_out[0](attended), weights

    def _split(self, x: Tensor) -> Tensor:
        """[B, heads, tokens, head width] of [B, tokens, width]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ProjectedGelu(nn.Module):
    """GELU in its tanh approximation, of a linear layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The second place is that of the dropout, so that the last linear is called `net.2`.
        self.net = nn.Sequential(ProjectedGelu(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class AdaptiveLayerNorm(nn.Module):
    """A layer norm whose scale and shift are made from the embedding of the timestep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, tokens, width] normalized; `time` is [B, width]."""
        scale, shift = self.linear(F.silu(time)).chunk(2, dim=-1)
        return modulate(self.norm(x), scale, shift)


class TransformerBlock(nn.Module):
    """Attention to its own tokens and a feed-forward layer, each after a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, tokens, width]; `mask` is bool [B, tokens], False for tokens that nothing may attend to."""
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed, mask)[0]
        return x + self.ff(self.norm3(x))


class DiffusionBlock(nn.Module):
    """The same, with its first norm told the timestep; attends to `context_width` channels, or to its own tokens if
    that is None."""

    def __init__(self, width: int, heads: int, context_width: int | None) -> None:
        super().__init__()
        self.norm1 = AdaptiveLayerNorm(width)
        self.attn1 = Attention(width, heads, context_width or width)
        self.norm3 = nn.LayerNorm(width, elementwise_affine=False)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B, tokens, width]; `time` is [B, width], `context` [B, key, context width], `mask` bool [B, key]."""
        normed = self.norm1(x, time)
        x = x + self.attn1(normed, normed if context is None else context, mask)[0]
        return x + self.ff(self.norm3(x))


class SelfAttentionTransformer(nn.Module):
    """The transformer over the features of vision and language."""

    def __init__(self, size: SelfAttentionSize) -> None:
        super().__init__()
        blocks = (TransformerBlock(size.width, size.num_attention_heads) for _ in range(size.num_layers))
        self.transformer_blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, width]; `mask` is bool [B, L]."""
        for block in self.transformer_blocks:
            x = block(x, mask)
        return x


class TimestepEmbedder(nn.Module):
    """Two linear layers after the sinusoids of the timestep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(_TIMESTEP_CHANNELS, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, sinusoids: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class TimestepEncoder(nn.Module):
    """The embedding of a timestep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(width)

    def forward(self, timestep: Tensor) -> Tensor:
        """[B, width] of timesteps [B]."""
        count = _TIMESTEP_CHANNELS // 2
        channels = torch.arange(count, dtype=torch.float32, device=timestep.device)
        angles = timestep.float()[:, None] * (-math.log(LONGEST_PERIOD) * channels / (count - 1)).exp()
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.timestep_embedder(sinusoids.to(self.timestep_embedder.linear_1.weight.dtype))


class DiffusionTransformer(nn.Module):
    """Even blocks attend to the features of vision and language, odd ones to their own tokens."""

    def __init__(self, size: DiffusionSize) -> None:
        super().__init__()
        self.timestep_encoder = TimestepEncoder(size.width)
        contexts = [size.cross_attention_dim if index % 2 == 0 else None for index in range(size.num_layers)]
        self.transformer_blocks = nn.ModuleList(
            DiffusionBlock(size.width, size.num_attention_heads, context) for context in contexts
        )
        self.norm_out = nn.LayerNorm(size.width, eps=1e-6, elementwise_affine=False)
        self.proj_out_1 = nn.Linear(size.width, 2 * size.width)
        self.proj_out_2 = nn.Linear(size.width, size.output_dim)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """[B, tokens, output] of x [B, tokens, width].

        `timestep` is int64 [B], a bucket; `context` [B, L, context width], `mask` bool [B, L].
        """
        time = self.timestep_encoder(timestep)
        for index, block in enumerate(self.transformer_blocks):
            x = block(x, time, context, mask) if index % 2 == 0 else block(x, time)
        shift, scale = self.proj_out_1(F.silu(time)).chunk(2, dim=-1)
        return self.proj_out_2(modulate(self.norm_out(x), scale, shift))


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x [B, tokens, width], scaled by 1 + `scale` and shifted by `shift`, both [B, width]."""
    return x * (1 + scale[:, None]) + shift[:, None]
