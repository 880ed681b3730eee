"""Our formulas against well-kept implementations of the same methods, on the same layer and the same inputs.

GPTQ, AWQ and SmoothQuant are those of NVIDIA Model Optimizer. Its scales are float32 and ours are rounded to
bfloat16, so layers are made whose peaks give scales that both can store.
"""

from __future__ import annotations

from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from omega_qvla.numerics.gptq import gptq
from omega_qvla.numerics.low_rank import low_rank
from omega_qvla.numerics.quantizer import dequantize, output_error, peak_scale, qmax, quantize, storable, weight_scale
from omega_qvla.numerics.rotation import hadamard
from omega_qvla.numerics.saliency import searched_factor
from omega_qvla.numerics.smoothing import smoothing_factor

# Model Optimizer loads model libraries on import, hence the imports inside functions and the marker.
slow = pytest.mark.slow


def random(*shape: int, seed: int) -> Tensor:
    """Values that float32 can store, because Model Optimizer computes in it."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def correlated_inputs(tokens: int, width: int, seed: int) -> Tensor:
    return (random(tokens, width, seed=seed) @ random(width, width, seed=seed + 1)).float().double()


def skewed_inputs(tokens: int, width: int, seed: int) -> Tensor:
    return (random(tokens, width, seed=seed) * (1.5 * random(width, seed=seed + 1)).exp()).float().double()


def with_exact_peaks(weight: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """The weight with groups stretched until each peak is the largest code times a power of two."""
    groups = weight.unflatten(1, (-1, group_size or weight.shape[1]))
    peak = groups.abs().amax(-1, keepdim=True)
    return (groups / peak * qmax(bits) * peak.log2().round().exp2()).flatten(1).float().double()


def optimized(weight: Tensor, x: Tensor, algorithm: dict[str, Any], quantizers: dict[str, Any]) -> Any:
    """A linear layer with W [out, in] as Model Optimizer quantizes it on x [tokens, in]."""
    import modelopt.torch.quantization as mtq

    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.float()
    entries = [{"quantizer_name": f"*{name}_quantizer", "cfg": config} for name, config in quantizers.items()]
    configuration = {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *entries], "algorithm": algorithm}
    mtq.quantize(model, configuration, lambda model: model(x.float()))
    return model[0]


@pytest.mark.parametrize("size", [1, 2, 16, 64, 256])
def test_hadamard_is_scipys(size: int) -> None:
    assert torch.equal(hadamard(size) * size**0.5, torch.from_numpy(scipy.linalg.hadamard(size)).double())


@slow
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("width", [64, 192])
def test_gptq_gives_the_same_weights(bits: int, width: int) -> None:
    """From its own Hessian to the rounded weights; scales per output channel, the lowest code included."""
    weight = with_exact_peaks(random(16, width, seed=0), bits)
    x = correlated_inputs(600, width, seed=1)
    layer = optimized(weight, x, {"method": "gptq", "perc_damp": 0.01}, {"weight": {"num_bits": bits, "axis": 0}})
    codes, scale = gptq(weight, x.t() @ x, bits=bits, damping=0.01, codes="full")
    assert torch.equal(dequantize(codes, scale), layer.weight.data.double())
    assert not torch.equal(codes, quantize(weight, scale, bits, "full"))


@slow
@pytest.mark.parametrize("group_size", [16, 64])
def test_gptq_gives_the_same_weights_in_groups(group_size: int) -> None:
    """Its loop over the columns with our scales, fitted anew when a group's first column is reached."""
    from modelopt.torch.quantization.utils.calib_utils import compute_hessian_inverse, gptq_blockwise_update

    weight, x = random(16, 192, seed=0), correlated_inputs(600, 192, seed=1)
    scale, columns = torch.ones(16, 192 // group_size).double(), iter(range(192))

    def rounded(corrected: Tensor) -> Tensor:
        group, offset = divmod(next(columns), group_size)
        if offset == 0:
            scale[:, group] = weight_scale(corrected, 4, group_size)[:, group]
        return dequantize(quantize(corrected, scale, 4), scale)

    theirs = weight.clone()
    gptq_blockwise_update(theirs, compute_hessian_inverse(x.t() @ x, weight, 0.01), 128, rounded)
    codes, ours = gptq(weight, x.t() @ x, bits=4, group_size=group_size)
    assert torch.equal(ours, scale)
    assert torch.equal(dequantize(codes, ours), theirs)


def awq_error(x: Tensor, weight: Tensor, factor: Tensor) -> float:
    scale = weight_scale(weight * factor, 4)
    residual = dequantize(quantize(weight * factor, scale, 4), scale) / factor - weight
    return float(output_error(residual, x.t() @ x).sum())


@slow
@pytest.mark.parametrize("seed", range(5))
def test_awq_finds_a_factor_that_is_as_good(seed: int) -> None:
    """On a weight whose columns hold the same magnitudes, where AWQ's code with weights in the factor,
    s = mean|X|^α / mean|W|^(1-α), tries the same factors. The two disagree on near ties alone."""
    index = torch.arange(64)
    weight = random(64, seed=seed).abs()[(index[:, None] + index) % 64] * random(64, 64, seed=seed + 10).sign()
    x = skewed_inputs(300, 64, seed=seed + 20)
    layer = optimized(weight, x, {"method": "awq_lite", "alpha_step": 0.1}, {"weight": {"num_bits": 4, "axis": 0}})
    theirs = 1 / layer.input_quantizer.pre_quant_scale.double().flatten()
    ours = searched_factor(x.abs().mean(0), [weight], x.t() @ x, bits=4, group_size=None, candidates=10)
    assert awq_error(x, weight, ours) <= awq_error(x, weight, theirs) * (1 + 1e-5)
    if seed == 0:
        assert torch.allclose(ours.double(), theirs, rtol=1e-5)


@slow
@pytest.mark.parametrize("seed", range(3))
def test_clip_search_finds_the_same_scales(seed: int) -> None:
    """Its candidates go on to 0.50, which none of these groups takes; it clamps to -8."""
    weight, x = with_exact_peaks(random(16, 64, seed=seed) ** 3, 4, 16), correlated_inputs(200, 64, seed=seed + 10)
    algorithm = {"method": "awq_clip", "max_tokens_per_batch": 200}
    layer = optimized(weight, x, algorithm, {"weight": {"num_bits": 4, "block_sizes": {-1: 16}}})
    theirs = layer.weight_quantizer.amax.double().view(16, 4) / 7
    assert (theirs / peak_scale(weight, 4, 16)).min() > 0.54
    ours = weight_scale(weight, 4, 16, "output", x.t() @ x, codes="full")
    assert (ours == storable(theirs)).double().mean() > 0.9  # bfloat16 decides near ties otherwise

    def errors(scale: Tensor) -> Tensor:
        residual = (dequantize(quantize(weight, scale, 4, "full"), scale) - weight).unflatten(1, (4, 16))
        return torch.stack([(x[:, 16 * g : 16 * g + 16] @ residual[:, g].t()).square().sum(0) for g in range(4)], 1)

    assert (errors(ours) <= errors(storable(theirs)) * (1 + 1e-9)).all()


@slow
@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.8])
def test_smoothing_factors_are_the_same(alpha: float) -> None:
    weight, x = random(16, 32, seed=0), skewed_inputs(100, 32, seed=1)
    quantizers = {"weight": {"num_bits": 8, "axis": 0}, "input": {"num_bits": 8, "axis": None}}
    layer = optimized(weight, x, {"method": "smoothquant", "alpha": alpha}, quantizers)
    theirs = 1 / layer.input_quantizer.pre_quant_scale.flatten()
    assert torch.allclose(smoothing_factor(x.abs().amax(0), weight, alpha).float(), theirs, rtol=1e-5)


@slow
def test_the_low_rank_branch_is_the_same() -> None:
    from modelopt.torch.quantization.model_calib import svd

    weight = random(24, 32, seed=0)
    up, down = svd(weight, 4)
    assert torch.allclose(torch.matmul(*low_rank(weight, 4)), up @ down)
