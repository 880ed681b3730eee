"""A module with the published names of OpenVLA, of any size, and of OpenVLA-OFT's additions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from omega_qvla.policies.action_tokens import expected_actions
from omega_qvla.policies.named_module import DifferentiableActions, Infer
from omega_qvla.policy import Observation

ACTION_DIMENSION, BINS = 3, 256
CENTERS = torch.linspace(-1, 1, BINS)


@dataclass(frozen=True)
class Sizes:
    """Of a vision tower: width, width of its MLP, blocks, heads. Of Llama: the same, and its vocabulary."""

    dinov2: tuple[int, int, int, int] = (32, 64, 2, 2)
    siglip: tuple[int, int, int, int] | None = (16, 48, 2, 2)
    llama: tuple[int, int, int, int] = (64, 128, 2, 4)
    vocabulary: int = 320
    patch: int = 4


FULL = Sizes((1024, 4096, 24, 16), (1152, 4304, 27, 16), (4096, 11008, 32, 32), 32064, 14)
"""OpenVLA-7B: DINOv2 ViT-L/14 with registers, SigLIP so400m, Llama-2-7B."""


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), _Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), _Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Pool(nn.Module):
    """Is in SigLIP and never runs."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = _Mlp(width, hidden)


class _Tower(nn.Module):
    """Patches of the last block but one; the last runs for nothing, as in OpenVLA."""

    def __init__(self, width: int, hidden: int, depth: int, heads: int, patch: int, pooled: bool) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.Sequential(*(_Block(width, hidden, heads) for _ in range(depth)))
        if pooled:
            self.attn_pool = _Pool(width, hidden)

    def forward(self, pixels: Tensor) -> Tensor:
        patches, x = [], self.patch_embed["proj"](pixels).flatten(2).mT
        for block in self.blocks:
            x = block(x)
            patches.append(x)
        return patches[-2]


class _Vision(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.featurizer = _Tower(*sizes.dinov2, sizes.patch, pooled=False)
        if sizes.siglip is not None:
            self.fused_featurizer = _Tower(*sizes.siglip, sizes.patch, pooled=True)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.cat([tower(pixels) for tower in self.children()], -1)


class _Projector(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(width, 4 * width), nn.Linear(4 * width, out), nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(nn.functional.gelu(self.fc2(nn.functional.gelu(self.fc1(x)))))


class NamedOpenVLA(nn.Module):
    """One image and a prompt in, `ACTION_DIMENSION` action tokens out, one after the other."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, hidden, depth, heads = sizes.llama
        self.vision_backbone = _Vision(sizes)
        seen = sizes.dinov2[0] + (sizes.siglip[0] if sizes.siglip else 0)
        self.projector = _Projector(seen, width)
        config = LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=heads,
        )
        self.language_model = LlamaForCausalLM(config)
        self.tokens = sizes.vocabulary - 1 - torch.arange(BINS, device="cpu")

    def forward(self, pixels: Tensor, prompt: Tensor) -> Tensor:
        """Logits [B, positions, vocabulary]."""
        words = self.language_model.get_input_embeddings()(prompt)
        embedded = torch.cat([self.projector(self.vision_backbone(pixels)), words], 1)
        return self.language_model(inputs_embeds=embedded, use_cache=False).logits

    @torch.no_grad()
    def generate(self, pixels: Tensor, prompt: Tensor) -> Tensor:
        """The prompt and the likeliest action tokens, int64 [B, words + ACTION_DIMENSION]."""
        for _ in range(ACTION_DIMENSION):
            best = self(pixels, prompt)[:, -1, self.tokens].argmax(-1)
            prompt = torch.cat([prompt, self.tokens[best][:, None]], 1)
        return prompt


class ActionHead(nn.Module):
    """OpenVLA-OFT's: an MLP over the hidden states of all action tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        block = nn.ModuleDict({"ffn": nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())})
        self.model = nn.ModuleDict(
            {
                "fc1": nn.Linear(7 * width, width),
                "mlp_resnet_blocks": nn.ModuleList([block]),
                "fc2": nn.Linear(width, 7),
            }
        )


def inputs_of(observation: Observation) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, H, W] and prompts [B, words]."""
    pixels = torch.from_numpy(observation.images["primary"]).permute(0, 3, 1, 2) / 255
    words = [[len(word) for word in sentence.split()] for sentence in observation.instructions]
    return pixels, torch.tensor(words)


def inference(vla: NamedOpenVLA) -> Infer:
    """What a user gives as `infer`."""

    def infer(observation: Observation) -> np.ndarray:
        said = vla.generate(*inputs_of(observation))[:, -ACTION_DIMENSION:]
        return CENTERS[vla.tokens[0] - said][:, None].numpy()

    return infer


def gradients(vla: NamedOpenVLA) -> DifferentiableActions:
    """What a user gives as `differentiable_actions`."""

    def actions(observation: Observation) -> Tensor:
        pixels, prompt = inputs_of(observation)
        logits = vla(pixels, vla.generate(pixels, prompt))[:, -ACTION_DIMENSION - 1 : -1]
        return expected_actions(logits, vla.tokens, CENTERS)

    return actions


def random_images(count: int, seed: int = 0) -> Observation:
    """Observations of one camera, 8 × 8 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return Observation({"primary": pixels}, np.zeros((count, 0), np.float32), ("pick up the red mug",) * count)
