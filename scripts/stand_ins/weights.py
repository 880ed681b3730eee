"""Random weights that behave like trained ones where it matters to quantization.

Every layer matters: weights are normal numbers with a standard deviation of fan_in^-0.5, norms are near 1, gates
are open. What makes released policies hard to quantize is planted: in every layer of language model and action
expert, a few channels of each norm, and a few rows of the projections to values and to the hidden layer, are 20 to 30
times as large as the others. (`omega_qvla.studies.twin` has the published ratios and keeps the function; here there
is none to keep.) Norms without weights, as before the MLPs of GR00T's action head, stay as they are.

Tensors are drawn piece by piece while they are written, each from a seed of its own.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from omega_qvla.pack.stream import TensorSource, write_tensors
from omega_qvla.policies import families
from omega_qvla.policies.stored import INDEX_FILE, WEIGHTS_FILE

OUTLIER_SHARE = 1 / 128
"""Of the channels of each norm, and of the rows of each projection."""
GAINS = (20.0, 30.0)
"""Between which the factors of outliers lie."""

_DRAWN = 2**20
"""Numbers that are drawn at a time."""
_GEMMA = ("pi05", "pi0")
"""Families whose norms without bias multiply by 1 + their weight."""
_MODULATIONS = {re.compile(r"norm\.dense\.(weight|bias)$"): 3, re.compile(r"norm1\.linear\.(weight|bias)$"): 2}
"""What makes a norm's scale and shift from the denoising time, and for pi0.5 its gate: so many equal shares of its
rows, the scale's first. The norm multiplies by 1 + scale."""
_PLANTED_NORM = re.compile(r"(input|post_attention)_layernorm\.weight$")
_PLANTED_PROJECTION = re.compile(r"(self_attn\.v_proj|mlp\.up_proj|attn1\.to_v|ff\.net\.0\.proj)\.weight$")


def weights(family: str, directory: Path, seed: int) -> dict[str, TensorSource]:
    """The tensors of the policy that `directory` describes, in the dtypes in which it runs, drawn when they are read.

    Of tensors that are copies of each other one is left out, as in released files.
    """
    adapter = families()[family]
    module = adapter.without_values(directory)
    sites = adapter(module, directory, "stand-in", "float").sites()
    planted = tuple({f"{site.block}." for site in sites if site.part != "vision"})
    left_out: set[str] = set()
    for copy, original in adapter.copies.items():
        if original not in left_out:
            left_out.add(copy)
    tensors = {name: tensor for name, tensor in module.state_dict().items() if name not in left_out}
    sources = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        has_bias = f"{name.removesuffix('weight')}bias" in tensors
        added = 1.0 if family in _GEMMA and name.endswith("norm.weight") and not has_bias else 0.0
        draw = partial(_draw, name, shape, tensor.dtype, added, name.startswith(planted), seed)
        sources[name] = TensorSource(tensor.dtype, shape, draw)
    return sources


def write_weights(sources: Mapping[str, TensorSource], directory: Path, shard_bytes: int | None) -> None:
    """One file, or with `shard_bytes` an index and files of about that size at most."""
    if shard_bytes is None:
        write_tensors(directory / WEIGHTS_FILE, sources)
        return
    shards: list[dict[str, TensorSource]] = [{}]
    for name, source in sources.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + source.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = source
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(directory / file, shard, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(source.nbytes for source in sources.values())}, "weight_map": places}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _draw(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, added: float, planted: bool, seed: int
) -> Iterator[Tensor]:
    """The values of a tensor, some rows at a time. `added`: what the policy adds to them before it uses them."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    gain = torch.ones(shape[0])
    if planted:
        channels = shape[0] // _shares(name)
        chosen = torch.randperm(channels, generator=generator)[: max(1, round(OUTLIER_SHARE * channels))]
        gain[chosen] = torch.empty(len(chosen)).uniform_(*GAINS, generator=generator)
    mean, deviation = _rows(name, shape, gain)
    columns = prod(shape[1:])
    rows = max(1, _DRAWN // columns)
    for m, d in zip((mean - added).split(rows), deviation.split(rows), strict=True):
        values = torch.randn(len(m), columns, generator=generator)
        yield values.mul_(d[:, None]).add_(m[:, None]).to(dtype)


def _rows(name: str, shape: tuple[int, ...], gain: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [rows] of every row of a tensor; `gain` [rows] is that of outliers."""
    nothing, one = torch.zeros(shape[0]), torch.ones(shape[0])
    fan_in = shape[1] if len(shape) == 3 else prod(shape[1:])  # GR00T has weights [embodiments, in, out]
    if (shares := _shares(name)) > 1:
        if name.endswith("weight"):
            return nothing, 0.3 * fan_in**-0.5 * one
        gate = (torch.arange(shape[0]) * shares // shape[0]) == 2
        return gain - 1 + gate, 0.1 * one
    if len(shape) == 1:
        if name.endswith("bias"):
            return nothing, 0.1 * one
        return (gain, 0.1 * gain) if _PLANTED_NORM.search(name) else (one, 0.1 * one)
    deviation = fan_in**-0.5 * one
    return nothing, deviation * gain if _PLANTED_PROJECTION.search(name) else deviation


def _shares(name: str) -> int:
    """Into how many equal shares the rows of a tensor fall."""
    return next((shares for pattern, shares in _MODULATIONS.items() if pattern.search(name)), 1)
