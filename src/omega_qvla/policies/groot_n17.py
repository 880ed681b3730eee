"""GR00T N1.7 in lerobot's implementation.

Anatomy: Qwen3-VL's vision tower sees the patches of all cameras in one call and hands features of several depths to
the language model; the first layers of the language model read image and prompt tokens once; their output, before
the last norm, is refined by a small self-attention stack and read by every second layer of the DiT, which denoises a
chunk of actions in several steps. These layers attend by turns to the text and to the image tokens, always to the
same tensor: there queries are made from one input, keys and values from another. The layers between them attend to
state and actions alone.

No attention is offered for correction: Qwen3 normalizes queries after their projection, which takes a factor on them
out again, and diffusers' attention returns no weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.groot import GrootPolicy
from lerobot.policies.groot.configuration_groot import GROOT_N1_7_BACKBONE_MODEL, infer_groot_n1_7_action_horizon
from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config
from lerobot.policies.groot.processor_groot import (
    GrootActionUnpackUnnormalizeStep,
    GrootN17PackInputsStep,
    GrootN17VLMEncodeStep,
)
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline, ProcessorStep
from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen3VLConfig

from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.anatomy import (
    ATTENTION_AND_GATED_MLP,
    CROSS_ATTENTION,
    GROOT_ACTION_HEAD_KEPT,
    GROOT_ACTION_HEAD_OF_THE_STEP,
    SELF_ATTENTION,
    Block,
    Inputs,
    depth,
    stack,
)
from omega_qvla.policies.lerobot_policy import LerobotPolicy
from omega_qvla.policy import Observation, PreviousChunk

BASE_DIRECTORY = "base"
"""`config.json` of the base model, which states the sizes, and its `processor_config.json` if it was a local one."""
VLM_DIRECTORY = "vlm"
"""Configuration, processor and tokenizer of the VLM, as they lie in its hub repository."""
_VLM = "_groot_model.backbone.model"
_VISION = f"{_VLM}.model.visual.blocks"
_LANGUAGE = f"{_VLM}.model.language_model.layers"
_ACTION = "_groot_model.action_head.model.transformer_blocks"
_HEAD, _EMBEDDING = f"{_VLM}.lm_head.weight", f"{_VLM}.model.language_model.embed_tokens.weight"
_NO_RAMP = 1e9
"""A rate at which lerobot's ramp from held to free actions is 1 in float32 from the first action on."""

VISION: Inputs = {
    "attention_input": ("attn.qkv",),
    "attention_output": ("attn.proj",),
    "mlp_input": ("mlp.linear_fc1",),
    "mlp_hidden": ("mlp.linear_fc2",),
}
"""Qwen3-VL's tower."""


class GrootN17(LerobotPolicy):
    """A GR00T N1.7 policy, in floating point or quantized.

    Its checkpoint names a base model and a VLM on the hub instead of stating their sizes. Directories `base` and
    `vlm` beside `config.json` are used instead of the hub.

    It runs in the dtype of its parameters (float32, or bfloat16 with `model_params_fp32 = false`). lerobot's autocast
    (`use_bf16`) is left out: it would round what quantized layers and statistics compute inside to bfloat16.

    The noise has the horizon of the base model, of which lerobot may cut the actions to `chunk_size`.

    It continues a previous chunk in a way of its own: what is left of that chunk stands in the place of noise, moves
    not at all where it is executed before the new chunk is there, and then more and more (`rtc_ramp_rate`).
    """

    family = "groot"
    files = (
        *LerobotPolicy.files,
        *(f"{BASE_DIRECTORY}/{name}.json" for name in ("config", "processor_config")),
        *(f"{VLM_DIRECTORY}/*.{kind}" for kind in ("json", "txt", "jinja")),
    )
    copies: Mapping[str, str] = {_HEAD: _EMBEDDING, _EMBEDDING: _HEAD}  # they are one, saved under either name
    of_the_step = GROOT_ACTION_HEAD_OF_THE_STEP
    undone_by: Mapping[type[ProcessorStep], type[ProcessorStep]] = {
        **LerobotPolicy.undone_by,
        GrootActionUnpackUnnormalizeStep: GrootN17PackInputsStep,
    }
    kept: Mapping[str, str] = {
        r"visual\.(merger|deepstack_merger_list\.\d+)\.": "projects vision to language; small and sensitive",
        r"lm_head$": "not used to infer actions",
        **GROOT_ACTION_HEAD_KEPT,
    }

    @classmethod
    def build(cls, config: PreTrainedConfig, directory: Path) -> PreTrainedPolicy:
        named = config.base_model_path
        if (directory / BASE_DIRECTORY).is_dir():
            config.base_model_path = str(directory / BASE_DIRECTORY)
        settings = _stated(config.base_model_path, GR00TN17Config.model_type, named, directory / BASE_DIRECTORY)
        vlm = settings.get("model_name", GROOT_N1_7_BACKBONE_MODEL)
        if vlm != GROOT_N1_7_BACKBONE_MODEL:  # of this one, lerobot knows the sizes itself
            local = directory / VLM_DIRECTORY
            settings["model_name"] = str(local) if local.is_dir() else vlm
            _stated(settings["model_name"], Qwen3VLConfig.model_type, vlm, local)
        try:
            return _Groot(config, settings)
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise CheckpointError(
                f"{directory / 'config.json'} and {config.base_model_path}/config.json describe no GR00T N1.7 that "
                f"lerobot can build: {error}; correct them"
            ) from error

    def steps(self, module: PreTrainedPolicy) -> int:
        return module.head.num_inference_timesteps

    def sizes(self, module: PreTrainedPolicy) -> tuple[tuple[int, int], int]:
        return (module.head.action_horizon, module.head.action_dim), module.execute_steps

    def chunk(self, module: PreTrainedPolicy) -> int:
        return module.chunk

    def previous_actions(self) -> int:
        unpack = _steps(self._postprocessor, GrootActionUnpackUnnormalizeStep)
        return 0 if any(step.libero_gripper_action for step in unpack) else super().previous_actions()

    def image_features(self, config: PreTrainedConfig) -> list[str]:
        return list(config.image_features)

    def processors(
        self, config: PreTrainedConfig, directory: Path
    ) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
        """The checkpoint's pre- and postprocessor; a VLM that lies beside them is used instead of a hub's."""
        encode = {"device": "cpu"}
        if (directory / VLM_DIRECTORY).is_dir():
            encode["model_name"] = str(directory / VLM_DIRECTORY)
        overrides = {"device_processor": {"device": "cpu"}, "groot_n1_7_vlm_encode_v1": encode}
        pipelines = make_pre_post_processors(config, str(directory), preprocessor_overrides=overrides)
        self._check(pipelines[0], list(self.cameras(config, directory)), directory)
        return pipelines

    def follow(self, module: PreTrainedPolicy) -> None:
        head = module.head
        self._strength: Tensor | None = None
        head.action_encoder.register_forward_pre_hook(self._before_step)
        head.action_decoder.register_forward_hook(self._after_step)
        self._denoise_step = head.model.forward
        head.model.forward = self._step
        # Without their `torch.no_grad`: whether gradients are recorded is decided by who calls.
        for name in ("get_action", "get_action_with_features"):
            setattr(head, name, MethodType(inspect.unwrap(getattr(type(head), name)), head))

    def sample_continuing(self, observation: Observation, noise: Tensor, previous: PreviousChunk) -> Tensor:
        batch, left_over = self._with_previous(observation, previous)
        overlap = min(self._execution_horizon(previous), previous.actions.shape[1])
        noise = noise.clone()
        noise[:, :overlap] = left_over[:, :overlap]
        self._strength = self.module.strength(previous.delay, overlap, noise.shape[1])
        try:
            return self._predict(batch, noise=noise)
        finally:
            self._strength = None

    def blocks(self) -> list[Block]:
        return [
            *stack(self.module, "vision", _VISION, VISION),
            *stack(self.module, "language", _LANGUAGE, ATTENTION_AND_GATED_MLP),
            *(self._action_block(f"{_ACTION}.{index}") for index in range(depth(self.module, _ACTION))),
        ]

    def _action_block(self, name: str) -> Block:
        crosses = self.module.get_submodule(name).attn1.is_cross_attention
        return Block("action", name, CROSS_ATTENTION if crosses else SELF_ATTENTION)

    def _before_step(self, encoder: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.partial.append(inputs[0][:, : self.module.chunk].float())

    def _after_step(self, decoder: nn.Module, inputs: tuple[Tensor, ...], velocity: Tensor) -> Tensor | None:
        """Velocities [B, state and horizon, action dimension] as strong as the previous chunk lets them be."""
        if self._strength is None:
            return None
        states = velocity.shape[1] - len(self._strength)
        strength = nn.functional.pad(self._strength, (states, 0), value=1)
        return velocity * strength[:, None].to(velocity.dtype)

    def _step(self, **arguments: Any) -> Tensor:
        time = int(arguments["timestep"][0]) / self.module.head.num_timestep_buckets
        with self.step.at(round(time * self.denoising_steps)):
            return self._denoise_step(**arguments)

    def _check(self, preprocessor: PolicyProcessorPipeline, cameras: list[str], directory: Path) -> None:
        """Raises `CheckpointError` where lerobot would go on with other inputs, or fail when it infers."""
        path, head = directory / "policy_preprocessor.json", self.module.head.config
        for encode in _steps(preprocessor, GrootN17VLMEncodeStep):
            try:
                _ = encode.proc  # made now, and not when the first observation comes
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"the processor of {encode.model_name} cannot be made: {error}; put the .json, .jinja and .txt "
                    f"files of the VLM into {directory / VLM_DIRECTORY}"
                ) from error
        for pack in _steps(preprocessor, GrootN17PackInputsStep):
            embodiment = pack.embodiment_mapping.get(pack.embodiment_tag)
            if embodiment is None or not 0 <= embodiment < head.max_num_embodiments:
                raise CheckpointError(
                    f"{path}: embodiment_mapping gives {pack.embodiment_tag!r} the number {embodiment}; give it one "
                    f"of 0 to {head.max_num_embodiments - 1}"
                )
            if pack.max_state_dim != head.max_state_dim:
                raise CheckpointError(
                    f"{path}: max_state_dim is {pack.max_state_dim}, the model reads {head.max_state_dim}; make them "
                    "equal"
                )
            # lerobot accepts the wrist camera under this name too.
            known = {*cameras, *({"wrist_image"} if "image2" in cameras else ())}
            if unknown := [key for key in pack.video_modality_keys or () if key not in known]:
                raise CheckpointError(
                    f"{path}: video_modality_keys names {unknown[0]!r}, but config.json has the cameras "
                    f"{', '.join(cameras)}; give the camera the same name in both"
                )


class _Groot(GrootPolicy):
    """lerobot's policy, made without the weights of its base model, with the initial noise as an argument."""

    def __init__(self, config: PreTrainedConfig, settings: dict[str, Any]) -> None:
        self._settings = settings
        super().__init__(config)
        checkpoint = infer_groot_n1_7_action_horizon(config.base_model_path, config.embodiment_tag)
        self.chunk = min(self.head.action_horizon, config.chunk_size, checkpoint or config.chunk_size)
        self.execute_steps = min(self._action_queue_steps, self.chunk)

    def _create_groot_model(self) -> GR00TN17:
        """With any weights; otherwise as lerobot makes it from a base model whose `config.json` is `settings`."""
        steps = self.config.num_inference_timesteps
        given = {} if steps is None else {"num_inference_timesteps": steps}
        config = GR00TN17Config(**self._settings | given | {"use_flash_attention": False})
        model = GR00TN17(config, {"trust_remote_code": False}, load_backbone_weights=False)
        dtype = torch.float32 if self.config.model_params_fp32 else getattr(torch, str(config.dtype).split(".")[-1])
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model

    @property
    def head(self) -> nn.Module:
        return self._groot_model.action_head

    def init_rtc_processor(self) -> None:
        """GR00T needs none."""

    def strength(self, frozen: int, overlap: int, horizon: int) -> Tensor:
        """By how much of its velocity each action moves, float32 [horizon]: lerobot's ramp in `get_action`, which
        that one offers only together with noise of its own."""
        rate = self.config.rtc_ramp_rate
        rate = self._groot_model.config.rtc_ramp_rate if rate is None else rate
        ramp = 1 - torch.exp(-rate * torch.linspace(0, 1, overlap - frozen + 2))
        inner = (ramp / ramp[-1].clamp_min(1e-8))[1:-1]
        return torch.cat([torch.zeros(frozen), inner, torch.ones(horizon - overlap)])

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], noise: Tensor) -> Tensor:
        """Normalized actions [B, chunk, action dimension] from initial noise [B, horizon, padded action dimension].

        lerobot draws the noise itself, but starts from the end of a previous chunk where it is given one. The noise
        is given as such a chunk, of which nothing is frozen, at full velocity from the first action on.
        """
        horizon = noise.shape[1]
        options = {
            "action_horizon": horizon,
            "rtc_overlap_steps": horizon,
            "rtc_frozen_steps": 0,
            "rtc_ramp_rate": _NO_RAMP,
        }
        inputs = self._filter_groot_inputs(batch, include_action=False) | {"action": noise}
        actions = self._groot_model.get_action(inputs, options)["action_pred"]
        return actions[:, : self.chunk, : self.config.action_feature.shape[0]].float()


def _stated(source: str, model_type: str, named: str, place: Path) -> dict[str, Any]:
    """The `config.json` of a directory or hub repository; raises `CheckpointError` if it is not of `model_type`."""
    try:
        settings, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source} holds no readable config.json: {error}; put the files of {named}, without weights, into "
            f"{place}"
        ) from error
    if settings.get("model_type") != model_type:
        raise CheckpointError(
            f"{source}/config.json is of model_type {settings.get('model_type')!r} instead of {model_type!r}; put "
            f"the files of {named}, without weights, into {place}"
        )
    return settings


def _steps(pipeline: PolicyProcessorPipeline, kind: type) -> list[Any]:
    return [step for step in pipeline.steps if isinstance(step, kind)]
