"""pi0 and pi0.5 as openpi converts them to PyTorch, in lerobot's terms.

Such a checkpoint holds the same tensors without the prefix `model.`, the sizes of the model in `config.json`, and the
statistics of states and actions in `assets/<asset id>/norm_stats.json`. `translate` writes what lerobot needs besides
weights. Statistics lead to the same numbers as in openpi, which adds 1e-6 to every standard deviation and range.

What openpi keeps in its training configuration is not in the checkpoint and is not translated:

- Transforms of one robot: the names of its cameras (here they are openpi's own), actions relative to the state (the
  steps for them are written switched off), signs and units of joints and grippers.
- Which of the three cameras the robot has; for LIBERO openpi masks the last. All are needed unless
  `"cameras": ["base_0_rgb", "left_wrist_0_rgb"]` is added to `config.json`, which names those that are not masked.
- A pi0.5 that was trained without the state in its prompt, as openpi's own one for LIBERO was, is told only by
  `"discrete_state_input": false`, which has to be added to `config.json`. Without it, the state is in the prompt.
- Normalization other than openpi's default: by quantiles for pi0.5, by mean and standard deviation for pi0.
- How many actions of a chunk are executed: here all of them.

Images are resized by lerobot, in floating point where openpi rounds to 8 bits.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Literal

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.pi0 import PI0Config
from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.policies.pi05 import PI05Config
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    PolicyProcessorPipeline,
    RelativeActionsProcessorStep,
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from pydantic import ConfigDict, Field, FiniteFloat, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from omega_qvla.pack.checkpoint import written_beside
from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.paligemma_architecture import ARCHITECTURE_FILE
from omega_qvla.policies.stored import StoredTensors, read_json_object

_Camera = Literal["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]
CAMERAS: tuple[_Camera, ...] = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
IMAGE_SIZE = 224
TOKENIZER = "google/paligemma-3b-pt-224"
"""Its repository on the hub, as lerobot names it; a directory `tokenizer` in the checkpoint is used instead."""

_CONFIG_FILE, _STATISTICS_FILE, _TOKENIZER_DIRECTORY = "config.json", "norm_stats.json", "tokenizer"
_ADDED = 1e-6
"""To standard deviations and ranges, by openpi's `Normalize` and `Unnormalize`."""

_Variant = Literal["gemma_2b", "gemma_300m"]
_Vector = Annotated[list[FiniteFloat], Field(min_length=1)]
_Spread = Annotated[list[Annotated[FiniteFloat, Field(ge=0)]], Field(min_length=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class _Model:
    """The content of openpi's `config.json`."""

    action_dim: PositiveInt
    action_horizon: PositiveInt
    paligemma_variant: _Variant
    action_expert_variant: _Variant
    precision: Literal["float32", "bfloat16"]
    discrete_state_input: bool = True
    """openpi's name for having the state in the prompt of a pi0.5; its conversion does not write it."""
    cameras: Annotated[list[_Camera], Field(min_length=1)] = Field(default_factory=lambda: list(CAMERAS))
    """Those that the robot has: our name, its conversion does not write them."""


@dataclass(frozen=True, config=ConfigDict(strict=True))
class _Statistics:
    """Of every dimension of the states, or of the actions, in physical units."""

    mean: _Vector
    std: _Spread
    q01: _Vector | None = None
    q99: _Vector | None = None

    def __post_init__(self) -> None:
        if len({len(values) for values in (self.mean, self.std, self.q01, self.q99) if values is not None}) > 1:
            raise ValueError("mean, std, q01 and q99 must have the same length")

    @property
    def dimensions(self) -> int:
        """Without the zeros at the end to which checkpoints pad the vectors of a robot before they measure them."""
        used = [i for i, values in enumerate(zip(self.mean, self.std, strict=True)) if any(values)]
        return used[-1] + 1 if used else len(self.mean)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class _OfBoth:
    state: _Statistics
    actions: _Statistics


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class _Normalization:
    """The content of `norm_stats.json`."""

    norm_stats: _OfBoth


def module_name(key: str) -> str:
    """What lerobot calls the tensor with openpi's `key`."""
    return f"model.{key}"


def translate(directory: Path, out: Path, asset_id: str | None = None) -> None:
    """Write what lerobot needs besides weights for the openpi checkpoint in `directory`: configuration, processors
    and, if they lie there, `architecture.json` and `tokenizer`.

    `asset_id` chooses among several statistics. Nothing is loaded from a hub.

    Raises `CheckpointError` if `out` exists, if the checkpoint is not as openpi writes it, or if it holds no
    statistics, several and none is chosen, or others than its model needs.
    """
    model = _read(_Model, directory / _CONFIG_FILE)
    statistics_file = _statistics_file(directory, asset_id)
    of_both = _read(_Normalization, statistics_file).norm_stats
    for name, found in (("state", of_both.state), ("actions", of_both.actions)):
        if found.dimensions > model.action_dim:
            raise CheckpointError(
                f"{statistics_file}: {name} has {found.dimensions} dimensions, the model {model.action_dim}"
            )
    config = _config(_kind(directory), model, of_both)
    statistics = {
        OBS_STATE: _normalizer(of_both.state, config, f"{statistics_file}: state"),
        ACTION: _normalizer(of_both.actions, config, f"{statistics_file}: actions"),
    }
    with written_beside(out) as scratch:
        config.save_pretrained(scratch)
        for pipeline in _pipelines(config, statistics, model.discrete_state_input):
            pipeline.save_pretrained(scratch)
        if (directory / ARCHITECTURE_FILE).is_file():
            shutil.copyfile(directory / ARCHITECTURE_FILE, scratch / ARCHITECTURE_FILE)
        if (directory / _TOKENIZER_DIRECTORY).is_dir():
            shutil.copytree(directory / _TOKENIZER_DIRECTORY, scratch / _TOKENIZER_DIRECTORY)


def _read[T](kind: type[T], path: Path) -> T:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        return TypeAdapter(kind).validate_json(json.dumps(read_json_object(path)))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {place}: {first['msg']}") from error


def _statistics_file(directory: Path, asset_id: str | None) -> Path:
    assets = directory / "assets"
    found = {path.parent.relative_to(assets).as_posix(): path for path in sorted(assets.rglob(_STATISTICS_FILE))}
    if not found:
        raise CheckpointError(
            f"{assets} holds no {_STATISTICS_FILE}; copy the assets of the checkpoint that was converted there"
        )
    if asset_id is None and len(found) > 1:
        raise CheckpointError(
            f"{assets} holds the statistics of {', '.join(found)}; leave only those of the robot that is to be run"
        )
    chosen = next(iter(found)) if asset_id is None else asset_id
    if chosen not in found:
        raise CheckpointError(f"{assets} holds no statistics of {chosen}, but of {', '.join(found)}")
    return found[chosen]


def _kind(directory: Path) -> type[PI05Config] | type[PI0Config]:
    """Which of the two it is, told by the layers through which the denoising time enters."""
    tensors = StoredTensors.open(directory)
    if "time_mlp_in.weight" in tensors:
        return PI05Config
    if "action_time_mlp_in.weight" in tensors and "state_proj.weight" in tensors:
        return PI0Config
    raise CheckpointError(
        f"{tensors.source} is of neither a pi0.5, which has time_mlp_in.weight, "
        "nor a pi0, which has action_time_mlp_in.weight and state_proj.weight"
    )


def _config(kind: type[PI05Config] | type[PI0Config], model: _Model, statistics: _OfBoth) -> PI05Config | PI0Config:
    image = PolicyFeature(FeatureType.VISUAL, (3, IMAGE_SIZE, IMAGE_SIZE))
    state = PolicyFeature(FeatureType.STATE, (statistics.state.dimensions,))
    return kind(
        input_features={f"{OBS_IMAGES}.{camera}": image for camera in CAMERAS if camera in model.cameras}
        | {OBS_STATE: state},
        empty_cameras=sum(camera not in model.cameras for camera in CAMERAS),
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (statistics.actions.dimensions,))},
        paligemma_variant=model.paligemma_variant,
        action_expert_variant=model.action_expert_variant,
        dtype=model.precision,
        chunk_size=model.action_horizon,
        n_action_steps=model.action_horizon,
        max_state_dim=model.action_dim,
        max_action_dim=model.action_dim,
        image_resolution=(IMAGE_SIZE, IMAGE_SIZE),
        device="cpu",
    )


def _normalizer(statistics: _Statistics, config: PI05Config | PI0Config, where: str) -> dict[str, torch.Tensor]:
    """What lerobot's normalizer needs, float32 [dimensions] each: mean and std for pi0, q01 and q99 for pi0.5."""
    if isinstance(config, PI0Config):
        offset, scale = ("mean", statistics.mean), ("std", statistics.std)
    elif statistics.q01 is None or statistics.q99 is None:
        raise CheckpointError(f"{where} lacks q01 and q99, which a pi0.5 is normalized by; compute them with openpi")
    else:
        offset, scale = ("q01", statistics.q01), ("q99", statistics.q99)
    (first, offsets), (second, scales) = offset, scale
    used = slice(statistics.dimensions)
    return {first: torch.tensor(offsets[used]), second: torch.tensor([value + _ADDED for value in scales[used]])}


def _pipelines(
    config: PI05Config | PI0Config, statistics: dict[str, dict[str, torch.Tensor]], state_in_prompt: bool
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """lerobot's own steps in its own order, with a tokenizer that is named but not loaded."""
    steps = make_default_policy_processor_steps(config, statistics)
    relative = RelativeActionsProcessorStep(enabled=False)
    tokenize = TokenizerProcessorStep(tokenizer=TOKENIZER, max_length=config.tokenizer_max_length)
    tokenize.tokenizer, tokenize.tokenizer_name = None, TOKENIZER
    before = [steps.rename_observations, steps.add_batch_dim]
    if isinstance(config, PI05Config) and state_in_prompt:
        prompt = Pi05PrepareStateTokenizerProcessorStep(max_state_dim=config.max_state_dim)
        before += [relative, steps.normalize, prompt, tokenize, steps.to_device]
    else:
        before += [Pi0NewLineProcessor(), tokenize, steps.to_device, relative, steps.normalize]
    after = [
        steps.unnormalize,
        AbsoluteActionsProcessorStep(enabled=False, relative_step=relative),
        steps.to_cpu,
    ]
    return make_policy_processor_pipelines(input_steps=before, output_steps=after)
