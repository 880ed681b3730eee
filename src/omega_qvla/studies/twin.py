"""The outlier-matched twin: the same function with the activation outliers of a released VLA.

A small policy trained from nothing has well-behaved activations (channel max / median of 2 to 9), on which
naive 4-bit rounding loses little. Released policies have 4 to 60,000. The twin multiplies a few channels
between two linear operations by a power of two and divides them again on the other side, until every kind of
layer has the ratio that was published for pi0.5 (channel max / median of the inputs, layers 2, 8 and 14):

- norm -> attention input and MLP input: the norm's channel, and the columns that read it;
- values -> attention output: a value channel, in language model and expert alike because their values are
  attended jointly, and that column of every head;
- up -> MLP hidden: a row of the up projection, and the column of the down projection.

Powers of two are exact in floating point. The actions are compared before the twin is written.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from omega_qvla import api
from omega_qvla.calibration import Needs, collect
from omega_qvla.evaluation.run import one_thread
from omega_qvla.pack.checkpoint import written_beside
from omega_qvla.policies import open_policy
from omega_qvla.policies.stored import WEIGHTS_FILE
from omega_qvla.policy import Observation, QuantizablePolicy
from omega_qvla.studies.sweep import digest

# Channel max / median of pi0.5's activations (layers 2, 8, 14), one row for each of our four layers.
PUBLISHED_RATIOS = {
    "language": {
        "attention_input": (12.2, 12.1, 27.5, 12.2),
        "attention_output": (4.4, 3.1, 4.7, 4.4),
        "mlp_input": (14.3, 4.6, 7.4, 14.3),
        "mlp_hidden": (219.3, 21.3, 188.2, 219.3),
    },
    "action": {
        "attention_input": (10.0, 13.5, 5.3, 10.0),
        "attention_output": (8.0, 7.2, 7.7, 8.0),
        "mlp_input": (17.4, 5.6, 3.9, 17.4),
        "mlp_hidden": (27.8, 90.4, 61.7, 27.8),
    },
}
OUTLIER_SHARE = 1 / 64
"""Of a layer's channels."""
TOLERANCE = 1e-5
"""Largest change of an action (in [-1, 1]) that counts as the same function."""
COMPARED = 64
"""Observations on which the actions are compared."""


class TwinError(ValueError):
    """The twin of a checkpoint is another function than the checkpoint; nothing was written."""


def standard_sources(out: Path) -> dict[str, Path]:
    """The bundled policy as `policy`, and as `twin` its twin, which is made below `out` if it is not there yet."""
    policy = api.bundled_checkpoint()
    twin = out / f"twin-of-{digest(policy)[:12]}"
    if not twin.exists():
        with one_thread():
            make_twin(policy, twin)
    return {"policy": policy, "twin": twin}


def make_twin(checkpoint: Path, out: Path, calibration: Observation | None = None) -> dict[str, tuple[float, float]]:
    """Write the twin of a floating-point pi0.5 checkpoint into the new directory `out`.

    Outliers are placed by what the policy's layers read on `calibration`, by default its own Meta-World rollouts.
    Returns each site's channel max / median before and after. Raises `TwinError` if the actions differ,
    `CheckpointError` if `out` exists or `checkpoint` is none.
    """
    policy = open_policy(checkpoint)
    observations = api.calibrate_on_rollouts(policy).observations if calibration is None else calibration
    peaks = site_peaks(policy, observations)
    with written_beside(out) as scratch:
        for name, path in policy.support_files().items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, scratch / name)
        save_file({k: v.contiguous() for k, v in plant(policy, peaks).items()}, scratch / WEIGHTS_FILE)
        twin = open_policy(scratch)
        _check_same_function(policy, twin, observations[:COMPARED])
        after = site_peaks(twin, observations)
    return {name: (_ratio(peaks[name]), _ratio(after[name])) for name in peaks}


def site_peaks(policy: QuantizablePolicy, observations: Observation) -> dict[str, Tensor]:
    """Largest |X_j| [in] of every site of language model and expert."""
    sites = {site: Needs() for site in policy.sites() if site.part in PUBLISHED_RATIOS}
    statistics = collect(policy, sites, observations, noise_seed=0)
    return {name: found.peak for name, found in statistics.items() if found.peak is not None}


def plant(policy: QuantizablePolicy, peaks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The twin's tensors. `peaks` [in] by site name, of language model and expert."""
    stored = policy.stored_tensors()
    tensors = {name: stored.read(name) for name in stored.names()}
    blocks: dict[tuple[str, int], str] = {
        (site.part, int(site.block.rpartition(".")[2])): site.block for site in policy.sites()
    }
    depth = 1 + max(index for part, index in blocks if part == "language")
    for index in range(depth):
        shared: Tensor | None = None
        for part, ratios in PUBLISHED_RATIOS.items():
            block = blocks[part, index]
            target = {site: row[index % len(row)] for site, row in ratios.items()}
            attention, mlp = f"{block}.self_attn", f"{block}.mlp"
            scale = outlier_scales(peaks[f"{block}.attention_input"], target["attention_input"])
            readers = [f"{attention}.{leaf}_proj" for leaf in "qkv"]
            scale_norm(tensors, f"{block}.input_layernorm", readers, scale)
            scale = outlier_scales(peaks[f"{block}.mlp_input"], target["mlp_input"])
            readers = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
            scale_norm(tensors, f"{block}.post_attention_layernorm", readers, scale)
            if shared is None:
                shared = _value_scale(peaks, blocks, index, len(tensors[f"{attention}.v_proj.weight"]))
            _scale_between(tensors, f"{attention}.v_proj", f"{attention}.o_proj", shared)
            scale = outlier_scales(peaks[f"{block}.mlp_hidden"], target["mlp_hidden"])
            _scale_between(tensors, f"{mlp}.up_proj", f"{mlp}.down_proj", scale)
    return tensors


def outlier_scales(peak: Tensor, ratio: float) -> Tensor:
    """Powers of two [in] that raise 1 in 64 channels so that the largest peak becomes `ratio` times the median.

    `peak` [in]: largest |X_j|. The channels are those for which a power of two fits the ratio best.
    """
    exponent = torch.log2(ratio * peak.median() / peak.clamp(min=peak.median() * 1e-3))
    misfit = (exponent - exponent.round()).abs() + (exponent < 1) * 10.0
    scale = torch.ones_like(peak)
    chosen = misfit.argsort(stable=True)[: max(1, round(len(peak) * OUTLIER_SHARE))]
    scale[chosen] = torch.exp2(exponent[chosen].round().clamp(min=0))
    return scale


def scale_norm(tensors: dict[str, Tensor], norm: str, readers: list[str], scale: Tensor) -> None:
    """Multiply a norm's output by scale [in] and divide the columns that read it.

    Gemma's norm multiplies by 1 + w. adaRMS computes (1 + scale) x + shift from the time: both rows change.
    """
    width = len(scale)
    if f"{norm}.weight" in tensors:
        tensors[f"{norm}.weight"] = scale * (1 + tensors[f"{norm}.weight"].float()) - 1
    else:
        weight, bias = tensors[f"{norm}.dense.weight"].float(), tensors[f"{norm}.dense.bias"].float()
        weight[: 2 * width] *= scale.repeat(2)[:, None]
        bias[: 2 * width] *= scale.repeat(2)
        bias[:width] += scale - 1
        tensors[f"{norm}.dense.weight"], tensors[f"{norm}.dense.bias"] = weight, bias
    for reader in readers:
        tensors[f"{reader}.weight"] = tensors[f"{reader}.weight"] / scale


def _value_scale(peaks: dict[str, Tensor], blocks: dict[tuple[str, int], str], index: int, width: int) -> Tensor:
    """One scale per value channel [width], from both stacks' attention outputs (every head has that channel)."""
    per_channel, ratios = [], []
    for part in PUBLISHED_RATIOS:
        peak = peaks[f"{blocks[part, index]}.attention_output"]
        per_channel.append((peak / peak.median()).view(-1, width).amax(0))
        row = PUBLISHED_RATIOS[part]["attention_output"]
        ratios.append(row[index % len(row)])
    return outlier_scales(torch.stack(per_channel).amax(0), sum(ratios) / len(ratios))


def _scale_between(tensors: dict[str, Tensor], writer: str, reader: str, scale: Tensor) -> None:
    """Multiply the writer's rows by scale and divide the reader's columns, which may repeat per head."""
    tensors[f"{writer}.weight"] = tensors[f"{writer}.weight"] * scale[:, None].to(tensors[f"{writer}.weight"].dtype)
    repeats = tensors[f"{reader}.weight"].shape[1] // len(scale)
    tensors[f"{reader}.weight"] = tensors[f"{reader}.weight"] / scale.repeat(repeats).to(torch.bfloat16)


def _check_same_function(policy: QuantizablePolicy, twin: QuantizablePolicy, observations: Observation) -> None:
    noise = torch.randn((len(observations), *policy.noise_shape), generator=torch.Generator().manual_seed(0))
    difference = abs(policy.infer(observations, noise) - twin.infer(observations, noise)).max()
    if difference > TOLERANCE:
        raise TwinError(f"an action of the twin differs by {difference:.1e}, more than {TOLERANCE:.0e}")


def _ratio(peak: Tensor) -> float:
    return float(peak.max() / peak.median())
