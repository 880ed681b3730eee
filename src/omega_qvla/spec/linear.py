"""How one linear layer is quantized, as data: transform, weight, activation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True)

Bits = Annotated[int, Field(ge=2, le=8)] | Literal[16]
"""Width of a code; 16: not rounded."""
CHANNEL_WIDTHS = (16, 8, 4, 2, 0)
"""Widths that an output channel can be allocated; 0: pruned (QVLA §3)."""
Rotation = Literal["none", "svd", "hadamard", "svd_hadamard"]
Codes = Literal["symmetric", "full"]
"""Whether the lowest code of the width (-8 at four bits) stays unused, as in the papers, or is used."""


Arithmetic = Literal["integer", "dequantized", "simulated"]
"""How a quantized linear runs: on integer codes; on weights that are stored as codes and multiplied in floating
point, because one of the factors is not rounded; or in floating point that imitates integers."""


@dataclass(frozen=True, config=STRICT)
class TransformSpec:
    """What happens to an input, and inversely to the weights that read it, before either is rounded.

    In order: division by the smoothing factor, first rotation, permutation, rotation, both in blocks, division
    by the folded factor. All of it is exact in real arithmetic (Ω-QVLA Eq. 6-7, QuantVLA Eq. 25).
    """

    smoothing: float | Literal["search", "learned"] | None = None
    """The factor of each input channel. A number is SmoothQuant's α: peak(X_j)^α / peak(W_j)^(1-α) (SmoothQuant
    Eq. 4). `search` takes the best of a grid for the layer's output (AWQ §3.2); `learned` optimizes it for the
    block's output (OmniQuant §3.3)."""
    first_rotation: Rotation = "none"
    """Orthogonal matrix per block of channels before the permutation (DuQuant's first rotation)."""
    permutation: Literal["none", "zigzag", "interleaved"] = "none"
    """How channels are dealt to the blocks. `zigzag` gives each the same share of weight energy (Ω-QVLA §4.1);
    `interleaved` is largest, smallest, second largest ..., as the code released with Ω-QVLA does it."""
    rotation: Rotation = "none"
    """Orthogonal matrix per block of channels (Ω-QVLA Eq. 3-5)."""
    block_size: int = 64
    """Channels in a block; a power of two that divides the layer's input width."""
    folded_percentile: float | None = None
    """If set, rotated channel j is further divided by this percentile of |X'_j| over all steps, so that one
    scalar per step remains of a table of scales per step and channel (docs/methods)."""
    output_rotation: Rotation = "none"
    """Orthogonal matrix per block of output channels, undone after the product (DuQuant's row rotation)."""
    sharing: Literal["site", "linear"] = "site"
    """Whether linears that read one input share one transform, or each has its own as in the paper."""


@dataclass(frozen=True, config=STRICT)
class AllocationSpec:
    """Bits per output channel by its sensitivity in the space of actions (QVLA §3, Algorithm 1).

    Every channel of all layers whose rule carries this table competes for one budget. A channel gets 16, 8, 4,
    2 or 0 bits; 0 prunes it.
    """

    average_bits: float
    """The budget: mean bits of a weight over all these layers."""
    directions: int = 4
    """Random directions of the action space per observation in the Hutchinson estimate of the sensitivity."""
    observations: int = 32
    """Calibration observations on which sensitivities are measured."""
    remeasured: int = 64
    """The most sensitive channels, whose effect is measured by forward passes instead of estimated."""

    def __post_init__(self) -> None:
        if not 0 <= self.average_bits <= 16:
            raise ValueError(f"average_bits = {self.average_bits} is not between 0 and 16")
        if self.directions < 1 or self.observations < 1 or self.remeasured < 0:
            raise ValueError("directions and observations must be at least 1, remeasured at least 0")


@dataclass(frozen=True, config=STRICT)
class WeightSpec:
    """How a weight is rounded."""

    bits: Bits = 4
    group_size: int | None = None
    """Input channels that share a scale; None: one scale per output channel."""
    scale_search: Literal["max", "mse", "mse_coarse", "output", "learned"] = "max"
    """The scale is the peak's, or a fraction of it: that with the smallest squared error of the weight (`mse`;
    `mse_coarse` tries only the five fractions of the code released with Ω-QVLA), with the smallest error of the
    output (`output`, AWQ's clip search), or one optimized for the block's output (`learned`, OmniQuant)."""
    rounding: Literal["rtn", "gptq", "gptq_blockwise"] = "rtn"
    """`gptq_blockwise` solves each block of 128 columns for itself, as the code released with Ω-QVLA does."""
    damping: float = 0.01
    """Share of the Hessian's mean diagonal that GPTQ adds to its diagonal."""
    codes: Codes = "symmetric"
    rank: int = 0
    """Rank of a branch in 16 bits that takes the weight's largest singular values (SVDQuant); 0: none."""
    allocation: AllocationSpec | None = None
    """If set, each output channel has its own width and `bits` is not used."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank = {self.rank} is negative")
        if self.allocation is not None and (self.rounding != "rtn" or self.rank or self.scale_search == "learned"):
            raise ValueError("allocation goes with rounding 'rtn', rank 0 and a scale_search that is not 'learned'")
        if self.allocation is None and self.bits == 16 and (self.rank or self.rounding != "rtn"):
            raise ValueError("bits = 16 rounds nothing: rounding must be 'rtn' and rank 0")
        if self.scale_search in ("output", "learned") and self.rounding != "rtn":
            raise ValueError(f"scale_search {self.scale_search!r} goes with rounding 'rtn'")
        if self.rounding == "gptq_blockwise" and self.group_size != 128:
            raise ValueError("rounding 'gptq_blockwise' fits its scales per 128 columns: group_size must be 128")
        if self.rounding == "gptq_blockwise" and self.scale_search != "mse_coarse":
            raise ValueError("rounding 'gptq_blockwise' searches its scales as 'mse_coarse' does: say so")

    @property
    def mixed(self) -> bool:
        """Whether rows are stored with widths of their own."""
        return self.allocation is not None or self.bits == 16


@dataclass(frozen=True, config=STRICT)
class ActivationSpec:
    """How an input is rounded while the policy runs."""

    bits: Bits = 4
    """16: inputs stay in floating point, whatever the other fields say."""
    granularity: Literal["token", "token_group", "tensor", "channel"] = "token"
    """What shares a scale. An integer product cannot apply a scale per input channel: `channel` is simulated."""
    mode: Literal["dynamic", "per_step", "static"] = "dynamic"
    """Scales from the input itself, or calibrated per denoising step, or calibrated once."""
    group_size: int | None = None
    """Channels that share a scale; only with `token_group`."""
    percentile: float = 99.9
    """Of |X| over the calibration tokens; with calibrated scales only (Ω-QVLA Eq. 10)."""
    codes: Codes = "symmetric"

    def __post_init__(self) -> None:
        dynamic = self.granularity in ("token", "token_group")
        if dynamic != (self.mode == "dynamic"):
            raise ValueError(f"granularity {self.granularity!r} does not go with mode {self.mode!r}")
        if (self.granularity == "token_group") != (self.group_size is not None):
            raise ValueError("group_size belongs to granularity 'token_group', and only to it")

    @property
    def rounds(self) -> bool:
        return self.bits != 16

    @property
    def calibrated(self) -> bool:
        """Whether scales come from calibration."""
        return self.rounds and self.mode != "dynamic"


@dataclass(frozen=True, config=STRICT)
class LinearSpec:
    """How the linears of one input site are quantized."""

    transform: TransformSpec = Field(default_factory=TransformSpec)
    weight: WeightSpec = Field(default_factory=WeightSpec)
    activation: ActivationSpec = Field(default_factory=ActivationSpec)

    def __post_init__(self) -> None:
        if not self.activation.rounds and self.weight.bits == 16 and self.weight.allocation is None:
            raise ValueError("16 bits on both sides quantize nothing; use a `keep` rule")
        groups = self.weight.group_size, self.activation.group_size
        if None not in groups and groups[0] != groups[1]:
            raise ValueError(f"weights in groups of {groups[0]} and activations in groups of {groups[1]}")

    @property
    def execution(self) -> Arithmetic:
        """The best way in which these linears can run."""
        uniform = self.weight.allocation is None
        if not self.activation.rounds or (uniform and self.weight.bits == 16):
            return "dequantized"
        # An integer product cannot apply a scale per input channel.
        return "simulated" if self.activation.granularity == "channel" else "integer"

    @property
    def learned(self) -> bool:
        """Whether parameters are optimized for the output of the whole block."""
        return self.transform.smoothing == "learned" or self.weight.scale_search == "learned"

    @property
    def needs_hessian(self) -> bool:
        searched = self.transform.smoothing == "search" or self.weight.scale_search == "output"
        return searched or self.weight.rounding != "rtn" or self.weight.allocation is not None

    @property
    def needs_samples(self) -> bool:
        return self.activation.calibrated or self.transform.folded_percentile is not None

    @property
    def needs_calibration(self) -> bool:
        return self.needs_hessian or self.needs_samples or self.transform.smoothing is not None or self.learned
