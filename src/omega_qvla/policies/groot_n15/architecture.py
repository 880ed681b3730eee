"""The sizes of a GR00T N1.5, as its checkpoint states them.

`config.json` describes the action head and where the language model is cut. It does not describe the
vision-language model, Eagle 2.5: every released checkpoint has the same one. A checkpoint with another one has its
configuration in a file of its own, `eagle/config.json`, in the form in which NVIDIA publishes it.

Fields are named as in the files. What only training or the input pipeline reads is passed over by name; everything
else that this implementation does not compute is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.groot_n15.strict_json import read_strictly

CONFIG_FILE = "config.json"
BASE_FILE = "base/config.json"
"""The same of the base model, in a checkpoint whose own `config.json` is lerobot's."""
EAGLE_FILE = "eagle/config.json"

_STRICT = ConfigDict(extra="forbid", strict=True)

_HUGGING_FACE = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
    "attn_implementation", "auto_map", "dtype", "initializer_range", "torch_dtype", "transformers_version",
})  # fmt: skip
_TRANSFORMER_TRAINING = frozenset({"dropout", "final_dropout"})
_OUTERMOST = _HUGGING_FACE | {"compute_dtype", "hidden_size", "model_dtype"}
# By the key of the section, or by the file for its outermost one.
_WITHOUT_EFFECT: dict[str, frozenset[str]] = {
    CONFIG_FILE: _OUTERMOST,
    BASE_FILE: _OUTERMOST,
    # The original reads `eagle_path` nowhere: it builds the one Eagle that comes with its code.
    "backbone_cfg": frozenset({
        "eagle_path", "load_bf16", "tokenizer_assets_repo", "tune_llm", "tune_visual", "use_flash_attention",
    }),
    "action_head_cfg": frozenset({
        "detection_coeff", "expand_batch", "freeze_decode_layer", "load_pretrained_det_decode_layer_path",
        "max_action_dim", "model_dtype", "noise_beta_alpha", "noise_beta_beta", "noise_s", "tune_diffusion_model",
        "tune_projector",
    }),
    "diffusion_model_cfg": _TRANSFORMER_TRAINING,
    "vl_self_attention_cfg": _TRANSFORMER_TRAINING,
    EAGLE_FILE: _HUGGING_FACE | {
        "downsample_ratio", "dynamic_image_size", "force_image_size", "loss_version", "max_dynamic_tiles",
        "min_dynamic_tiles", "mlp_checkpoint", "pad2square", "template", "use_thumbnail",
    },
    "vision_config": _HUGGING_FACE | {"attention_dropout"},
    "text_config": _HUGGING_FACE | {
        "attention_dropout", "bos_token_id", "eos_token_id", "max_window_layers", "pad_token_id", "sliding_window",
        "tie_word_embeddings", "use_cache",
    },
}  # fmt: skip


def _equals(name: str, value: int, other: str, expected: int) -> None:
    if value != expected:
        raise ValueError(f"{name} is {value}, but {other} is {expected}; make them agree")


def _divides(name: str, value: int, other: str, total: int) -> None:
    if total % value:
        raise ValueError(f"{name} {value} does not divide {other} {total}; correct one of them")


@dataclass(frozen=True, config=_STRICT)
class VisionSize:
    """The SigLIP tower."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    image_size: PositiveInt
    """Pixels along a side."""
    patch_size: PositiveInt
    layer_norm_eps: PositiveFloat = 1e-6
    num_channels: Literal[3] = 3
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    model_type: Literal["siglip_vision_model"] = "siglip_vision_model"

    def __post_init__(self) -> None:
        _divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
        _divides("patch_size", self.patch_size, "image_size", self.image_size)

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, config=_STRICT)
class LanguageSize:
    """The Qwen3 language model before it is cut."""

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    max_position_embeddings: PositiveInt
    rope_theta: PositiveFloat
    rms_norm_eps: PositiveFloat = 1e-6
    rope_scaling: None = None
    attention_bias: Literal[False] = False
    use_sliding_window: Literal[False] = False
    hidden_act: Literal["silu"] = "silu"
    model_type: Literal["qwen3"] = "qwen3"

    def __post_init__(self) -> None:
        _divides("num_key_value_heads", self.num_key_value_heads, "num_attention_heads", self.num_attention_heads)


@dataclass(frozen=True, config=_STRICT)
class EagleSize:
    """Eagle 2.5: one token per image patch, and one linear layer between vision and language."""

    vision_config: VisionSize
    text_config: LanguageSize
    image_token_index: int
    """The token that stands where an image patch goes."""
    select_layer: Literal[-1] = -1
    use_pixel_shuffle: Literal[False] = False
    mlp_connector_layers: Literal[1] = 1
    use_backbone_lora: Literal[0] = 0
    use_llm_lora: Literal[0] = 0
    model_type: Literal["eagle_2_5_vl"] = "eagle_2_5_vl"


@dataclass(frozen=True, config=_STRICT)
class BackboneSize:
    """What the action head takes from Eagle."""

    select_layer: PositiveInt
    """The number of language layers that remain."""
    project_to_dim: None = None
    reproject_vision: Literal[False] = False


@dataclass(frozen=True, config=_STRICT)
class SelfAttentionSize:
    """The transformer over the features of vision and language."""

    num_attention_heads: PositiveInt
    attention_head_dim: PositiveInt
    num_layers: PositiveInt
    positional_embeddings: None

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True, config=_STRICT)
class DiffusionSize(SelfAttentionSize):
    """The diffusion transformer: even blocks attend to the features, odd ones to their own tokens."""

    output_dim: PositiveInt
    cross_attention_dim: PositiveInt
    interleave_self_attention: Literal[True]
    norm_type: Literal["ada_norm"]


@dataclass(frozen=True, config=_STRICT)
class ActionHeadSize:
    """The action head."""

    action_dim: PositiveInt
    """Width of an action; robots with fewer joints are padded."""
    action_horizon: PositiveInt
    """Actions in a chunk."""
    max_state_dim: PositiveInt
    hidden_size: PositiveInt
    """Of the encoder of states and the decoder of actions."""
    input_embedding_dim: PositiveInt
    backbone_embedding_dim: PositiveInt
    num_inference_timesteps: PositiveInt
    """Denoising steps."""
    diffusion_model_cfg: DiffusionSize
    vl_self_attention_cfg: SelfAttentionSize
    max_num_embodiments: PositiveInt = 32
    max_seq_len: PositiveInt = 1024
    num_target_vision_tokens: PositiveInt = 32
    num_timestep_buckets: PositiveInt = 1000
    add_pos_embed: Literal[True] = True
    use_vlln: Literal[True] = True

    def __post_init__(self) -> None:
        diffusion, features = self.diffusion_model_cfg, self.backbone_embedding_dim
        _equals("input_embedding_dim", self.input_embedding_dim, "the width of diffusion_model_cfg", diffusion.width)
        _equals("hidden_size", self.hidden_size, "diffusion_model_cfg.output_dim", diffusion.output_dim)
        for name, width in (
            ("diffusion_model_cfg.cross_attention_dim", diffusion.cross_attention_dim),
            ("the width of vl_self_attention_cfg", self.vl_self_attention_cfg.width),
        ):
            _equals("backbone_embedding_dim", features, name, width)
        if self.action_horizon > self.max_seq_len:
            raise ValueError(f"action_horizon {self.action_horizon} exceeds max_seq_len {self.max_seq_len}")


@dataclass(frozen=True, config=_STRICT)
class _Config:
    """The content of `config.json`."""

    model_type: Literal["gr00t_n1_5"]
    action_dim: PositiveInt
    action_horizon: PositiveInt
    backbone_cfg: BackboneSize
    action_head_cfg: ActionHeadSize

    def __post_init__(self) -> None:
        head = self.action_head_cfg
        _equals("action_dim", self.action_dim, "action_head_cfg.action_dim", head.action_dim)
        _equals("action_horizon", self.action_horizon, "action_head_cfg.action_horizon", head.action_horizon)


@dataclass(frozen=True, config=_STRICT)
class Architecture:
    """All sizes of a GR00T N1.5."""

    eagle: EagleSize
    backbone: BackboneSize
    action_head: ActionHeadSize

    @classmethod
    def read(cls, directory: Path, file: str | None = CONFIG_FILE) -> Architecture:
        """The sizes of the checkpoint in `directory`, which `file` states; None: those of the release.

        Raises `CheckpointError` if a file is missing, is not of this form, or states what is not supported.
        """
        backbone, action_head, eagle = RELEASED.backbone, RELEASED.action_head, RELEASED.eagle
        if file is not None:
            config = read_strictly(directory, file, _Config, _WITHOUT_EFFECT)
            backbone, action_head = config.backbone_cfg, config.action_head_cfg
        if (directory / EAGLE_FILE).is_file():
            eagle = read_strictly(directory, EAGLE_FILE, EagleSize, _WITHOUT_EFFECT)
        language = eagle.text_config
        kept, width = backbone.select_layer, action_head.backbone_embedding_dim
        if kept > language.num_hidden_layers or width != language.hidden_size:
            raise CheckpointError(
                f"{directory / (file or CONFIG_FILE)} wants {kept} language layers of width {width}, but Eagle has "
                f"{language.num_hidden_layers} of width {language.hidden_size}; state another one in "
                f"{directory / EAGLE_FILE}"
            )
        return cls(eagle, backbone, action_head)


RELEASED = Architecture(
    eagle=EagleSize(
        image_token_index=151669,
        vision_config=VisionSize(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=224,
            patch_size=14,
        ),
        text_config=LanguageSize(
            vocab_size=151680,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            rope_theta=1e6,
        ),
    ),
    backbone=BackboneSize(select_layer=12),
    action_head=ActionHeadSize(
        action_dim=32,
        action_horizon=16,
        max_state_dim=64,
        hidden_size=1024,
        input_embedding_dim=1536,
        backbone_embedding_dim=2048,
        num_inference_timesteps=4,
        diffusion_model_cfg=DiffusionSize(
            num_attention_heads=32,
            attention_head_dim=48,
            num_layers=16,
            output_dim=1024,
            cross_attention_dim=2048,
            interleave_self_attention=True,
            norm_type="ada_norm",
            positional_embeddings=None,
        ),
        vl_self_attention_cfg=SelfAttentionSize(
            num_attention_heads=32, attention_head_dim=64, num_layers=4, positional_embeddings=None
        ),
    ),
)
"""nvidia/GR00T-N1.5-3B."""
