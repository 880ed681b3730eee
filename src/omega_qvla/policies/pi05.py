"""pi0.5 in lerobot's implementation.

Anatomy: a SigLIP tower sees each camera once; the Gemma language model reads image and prompt tokens once and
leaves its keys and values; the Gemma action expert denoises a chunk of actions in several steps, attending to
them. lerobot looks `denoise_step` up on the instance for every step, so that is where the step is known.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi05 import PI05Config, PI05Policy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from omega_qvla.pack.checkpoint import Checkpoint
from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.pi05_architecture import ARCHITECTURE_FILE, Architecture, build
from omega_qvla.policy import Attention, InputSite, Observation
from omega_qvla.runtime import DenoisingStep, install
from omega_qvla.runtime.linear import Execution, QuantizedLinear
from omega_qvla.spec import Part

WEIGHTS_FILE = "model.safetensors"
_STACKS = "model.paligemma_with_expert"
_LANGUAGE = f"{_STACKS}.paligemma.model.language_model.layers"
_EXPERT = f"{_STACKS}.gemma_expert.model.layers"
_VISION = f"{_STACKS}.paligemma.model.vision_tower.vision_model.encoder.layers"

_KEPT = {
    r"norm\.dense$": "modulates a norm from the denoising time; its output is a scale, shift and gate",
    r"multi_modal_projector": "the projector between vision and language; small and sensitive",
    r"lm_head$": "not used to infer actions",
    r"model\.action_(in|out)_proj$": "carries the actions themselves; small and sensitive",
    r"model\.time_mlp_(in|out)$": "embeds the denoising time; small and sensitive",
}


class PI05:
    """A pi0.5 policy, in floating point or quantized; see `omega_qvla.policy` for the interface."""

    family = "pi05"

    def __init__(self, module: PI05Policy, directory: Path, label: str, execution: str) -> None:
        self.module, self.directory, self.label, self.execution = module.eval(), directory, label, execution
        config = module.config
        self.noise_shape = (config.chunk_size, config.max_action_dim)
        self.execute_steps = config.n_action_steps
        self.denoising_steps = config.num_inference_steps
        self.step = DenoisingStep(self.denoising_steps)
        self._preprocessor, self._postprocessor = _processors(directory)
        self._cameras = [key.removeprefix("observation.images.") for key in config.image_features]
        self._partial: list[Tensor] = []
        self._denoise_step = module.model.denoise_step
        module.model.denoise_step = self._step

    @classmethod
    def open(cls, directory: Path) -> PI05:
        """In floating point, from a lerobot checkpoint. Raises `CheckpointError` if it does not load strictly."""
        config = _config(directory)
        module = build(config, Architecture.read(directory))
        _load_strictly(module, _read_weights(directory), directory / WEIGHTS_FILE)
        return cls(module, directory, "full precision", "float")

    @classmethod
    def load(cls, checkpoint: Checkpoint, execution: Execution) -> PI05:
        """Quantized, from a verified checkpoint. Weights that were quantized never exist in floating point."""
        directory = checkpoint.policy_directory
        config = _config(directory)
        config.device = None  # lerobot then moves nothing: weights without values cannot be moved
        with init_empty_weights(include_buffers=False):
            module = build(config, Architecture.read(directory))
        config.device = "cpu"
        recipe = checkpoint.manifest.plan.recipe
        best = recipe.execution
        policy = cls(module, directory, recipe.name, execution if best == "integer" else best)
        if policy.denoising_steps != checkpoint.manifest.denoising_steps:
            raise CheckpointError(
                f"{directory} is configured for {policy.denoising_steps} denoising steps, "
                f"the checkpoint was made for {checkpoint.manifest.denoising_steps}"
            )
        try:
            install(module, checkpoint.sites, policy.step, execution)
        except AttributeError as error:
            raise CheckpointError(
                f"{checkpoint.directory} does not fit the policy in {directory}: {error}"
            ) from error
        _load_strictly(module, checkpoint.kept, checkpoint.directory / "kept.safetensors", assign=True)
        return policy

    def infer(self, observation: Observation, noise: Tensor) -> np.ndarray:
        actions = self._postprocessor(self._sample(observation, noise))
        if not actions.isfinite().all():
            raise ValueError(f"policy {self.label!r} returned actions with NaN or infinity")
        return actions.float().numpy()

    def denoise(self, observation: Observation, noise: Tensor) -> Tensor:
        last = self._sample(observation, noise)
        padding = noise.shape[-1] - last.shape[-1]
        return torch.stack([*self._partial[1:], nn.functional.pad(last, (0, padding))])

    def resident_bytes(self) -> int:
        tensors = [*self.module.parameters(), *self.module.buffers()]
        operands = sum(m.operand_bytes() for m in self.module.modules() if isinstance(m, QuantizedLinear))
        return operands + sum(tensor.nbytes for tensor in tensors if tensor.device.type != "meta")

    def sites(self) -> list[InputSite]:
        sites: list[InputSite] = []
        for part, prefix, leaves in _ANATOMY:
            for index in range(_depth(self.module, prefix)):
                block = f"{prefix}.{index}"
                sites += [
                    InputSite(f"{block}.{name}", part, block, tuple(f"{block}.{linear}" for linear in linears))
                    for name, linears in leaves.items()
                ]
        return sites

    def attentions(self) -> list[Attention]:
        found = []
        stacks: tuple[tuple[Part, str], ...] = (("language", _LANGUAGE), ("action", _EXPERT))
        for part, prefix in stacks:
            for index in range(_depth(self.module, prefix)):
                name = f"{prefix}.{index}.self_attn"
                heads = self.module.get_submodule(name).config.num_attention_heads
                found.append(Attention(name, part, f"{name}.q_proj", f"{name}.o_proj", heads))
        return found

    def differentiable_actions(self, observation: Observation, noise: Tensor) -> Tensor:
        self._partial.clear()
        batch = self._preprocessor(self._batch(observation))
        images, masks = self.module._preprocess_images(batch)
        tokens, token_mask = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
        model = self.module.model
        sample = type(model).sample_actions.__wrapped__  # what it does beneath `torch.no_grad`
        actions = sample(model, images, masks, tokens, token_mask, noise=noise)
        return actions[..., : self.module.config.output_features[ACTION].shape[0]]

    def kept_because(self, linear: str) -> str:
        for pattern, reason in _KEPT.items():
            if re.search(pattern, linear):
                return reason
        raise KeyError(f"the pi0.5 adapter does not know the linear layer {linear}")

    def stored_tensors(self) -> dict[str, Tensor]:
        return _read_weights(self.directory)

    def support_files(self) -> dict[str, Path]:
        files = [self.directory / "config.json", self.directory / ARCHITECTURE_FILE]
        files += self.directory.glob("policy_*")
        files += (self.directory / "tokenizer").glob("*")
        return {str(path.relative_to(self.directory)): path for path in sorted(files) if path.is_file()}

    def _step(self, **arguments: Any) -> Tensor:
        time = float(arguments["timestep"].flatten()[0])
        self._partial.append(arguments["x_t"])
        with self.step.at(round((1 - time) * self.denoising_steps)):
            return self._denoise_step(**arguments)

    @torch.no_grad()
    def _sample(self, observation: Observation, noise: Tensor) -> Tensor:
        expected = (len(observation), *self.noise_shape)
        if tuple(noise.shape) != expected:
            raise ValueError(f"noise has shape {list(noise.shape)} instead of {list(expected)}")
        self._partial.clear()
        return self.module.predict_action_chunk(self._preprocessor(self._batch(observation)), noise=noise)

    def _batch(self, observation: Observation) -> dict[str, Any]:
        if missing := [camera for camera in self._cameras if camera not in observation.images]:
            raise ValueError(
                f"camera {missing[0]!r} is missing; the policy was trained with {', '.join(self._cameras)}"
            )
        if not np.isfinite(observation.state).all():  # it would be binned as if it were a number
            raise ValueError("the observation's state contains NaN or infinity")
        batch: dict[str, Any] = {"observation.state": torch.from_numpy(observation.state)}
        for camera in self._cameras:
            image = torch.from_numpy(observation.images[camera]).permute(0, 3, 1, 2)
            batch[f"observation.images.{camera}"] = image.float() / 255
        return batch | {"task": list(observation.instructions)}


_GEMMA = {
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
    "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_hidden": ("mlp.down_proj",),
}
_SIGLIP = {
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.out_proj",),
    "mlp_input": ("mlp.fc1",),
    "mlp_hidden": ("mlp.fc2",),
}
_ANATOMY: tuple[tuple[Part, str, dict[str, tuple[str, ...]]], ...] = (
    ("vision", _VISION, _SIGLIP),
    ("language", _LANGUAGE, _GEMMA),
    ("action", _EXPERT, _GEMMA),
)


def _depth(module: nn.Module, prefix: str) -> int:
    layers = module.get_submodule(prefix)
    assert isinstance(layers, nn.ModuleList)
    return len(layers)


def _config(directory: Path) -> PI05Config:
    config = PreTrainedConfig.from_pretrained(directory, local_files_only=True)
    if not isinstance(config, PI05Config):
        raise CheckpointError(f"{directory / 'config.json'} is not of a pi0.5 policy")
    config.device = "cpu"
    return config


def _read_weights(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from error


def _processors(directory: Path) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """The checkpoint's pre- and postprocessor; a tokenizer that lies beside them is used instead of a hub's."""
    overrides: dict[str, Any] = {"device_processor": {"device": "cpu"}}
    if (directory / "tokenizer").is_dir():
        overrides["tokenizer_processor"] = {"tokenizer_name": str(directory / "tokenizer")}
    before = PolicyProcessorPipeline.from_pretrained(
        directory, config_filename="policy_preprocessor.json", overrides=overrides, local_files_only=True
    )
    after = PolicyProcessorPipeline.from_pretrained(
        directory,
        config_filename="policy_postprocessor.json",
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
        local_files_only=True,
    )
    return before, after


def _load_strictly(module: nn.Module, tensors: dict[str, Tensor], path: Path, *, assign: bool = False) -> None:
    """Copy (or assign, in the module's dtype) every tensor; raises `CheckpointError` that names what does not fit."""
    expected = module.state_dict()
    if missing := sorted(set(expected) - set(tensors)):
        raise CheckpointError(f"{path} lacks {missing[0]} and {len(missing) - 1} other tensors of the policy")
    if unknown := sorted(set(tensors) - set(expected)):
        raise CheckpointError(f"{path} holds {unknown[0]} and {len(unknown) - 1} other tensors unknown to the policy")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            wanted = list(expected[name].shape)
            raise CheckpointError(f"{path}: {name} has shape {list(tensor.shape)} instead of {wanted}")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} contains NaN or infinity")
    if assign:
        tensors = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    module.load_state_dict(tensors, strict=True, assign=assign)
