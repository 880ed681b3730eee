"""The input sites of released policies whose speed counts, as their checkpoints have them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BenchSite:
    """Linears that read one input of [tokens, channels] and have so many outputs together."""

    policy: str
    part: str
    name: str
    tokens: int
    channels: int
    outputs: int

    @property
    def label(self) -> str:
        return f"{self.policy} {self.part} {self.name}"

    @property
    def shape(self) -> str:
        return f"{self.tokens}×{self.channels}×{self.outputs}"

    @property
    def products(self) -> int:
        """Multiply-adds."""
        return self.tokens * self.channels * self.outputs


SITES = (
    BenchSite("pi05", "action", "q, k, v", 50, 1024, 2048 + 2 * 256),
    BenchSite("pi05", "action", "o", 50, 2048, 1024),
    BenchSite("pi05", "action", "gate, up", 50, 1024, 2 * 4096),
    BenchSite("pi05", "action", "down", 50, 4096, 1024),
    BenchSite("groot_n15", "action", "self q, k, v", 49, 1536, 3 * 1536),
    BenchSite("groot_n15", "action", "cross q, out", 49, 1536, 1536),
    BenchSite("groot_n15", "action", "feed-forward in", 49, 1536, 6144),
    BenchSite("groot_n15", "action", "feed-forward out", 49, 6144, 1536),
    BenchSite("pi05", "language", "q, k, v", 560, 2048, 2048 + 2 * 256),
    BenchSite("pi05", "language", "o", 560, 2048, 2048),
    BenchSite("pi05", "language", "gate, up", 560, 2048, 2 * 16384),
    BenchSite("pi05", "language", "down", 560, 16384, 2048),
    BenchSite("groot_n15", "language", "q, k, v", 560, 2048, 2048 + 2 * 1024),
    BenchSite("groot_n15", "language", "gate, up", 560, 2048, 2 * 6144),
    BenchSite("groot_n15", "language", "down", 560, 6144, 2048),
)
"""pi0.5 with two cameras (512 image tokens and a prompt) and GR00T N1.5 (16 actions, the state, 32 future tokens)."""
