"""Who multiplies: the quantized linears of this package, and what else a user could install.

A contender prepares a weight once, as its library does, and then answers for inputs; whatever it does to the input
(rotation, rounding) is part of the answer. Those of other libraries are imported when they are prepared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omega_qvla.calibration.statistics import Needs, SiteStatistics
from omega_qvla.kernels import native
from omega_qvla.kernels.grouped_matmul import GroupedWeight
from omega_qvla.numerics.quantizer import peak_scale, qmax, quantize
from omega_qvla.pack.bits import unpack
from omega_qvla.pack.manifest import PlannedSite
from omega_qvla.pack.site import PackedSite
from omega_qvla.quantization.site import Found, quantize_site
from omega_qvla.runtime import DenoisingStep, QuantizedLinear, quantized_linears
from omega_qvla.spec import read_recipe, with_settings

Multiply = Callable[[Tensor], Tensor]
"""y float32 [tokens, out] of x float32 [tokens, in]."""

_CHECKED_ROWS = 4
"""Tokens whose products are repeated in 64-bit integers; those of a token do not depend on the others."""
_GROUP = 64
_ONNX_OPSET, _ONNX_IR = 21, 10
_ZERO_POINT = 128
"""Of unsigned bytes."""


class InexactError(ValueError):
    """A contender does not compute what it claims to; no speed is reported for it."""


class Contender(ABC):
    """One way to multiply with a weight W [out, in]."""

    name: str
    library: str
    """The distribution it comes from."""
    weight_bits: int
    input_bits: int
    largest_error: float
    """Of the output, relative to its norm, that rounding to these bits may cause on random numbers with some channels
    ten times as large."""

    @abstractmethod
    def prepare(self, weight: Tensor, tokens: int | None, threads: int) -> Multiply:
        """For weights float32 [out, in] and inputs of so many tokens, or of any number.

        Raises `ImportError` if its library is not installed.
        """

    def check(self, weight: Tensor, x: Tensor, multiply: Multiply) -> None:
        """Raises `InexactError` if the product of W float32 [out, in] and x float32 [tokens, in] is too far off."""
        exact = x @ weight.t()
        error = float((multiply(x) - exact).norm() / exact.norm())
        if not error <= self.largest_error:
            raise InexactError(f"{self.name} is off by {error:.2g} of the output, more than {self.largest_error:g}")

    @property
    def version(self) -> str:
        return version(self.library)


class Ours(Contender):
    """A site of the default recipe as the action head has it: smoothing, permutation, rotation, one scale for each
    token's group and one for each output's, codes multiplied as integers. Its bits are checked."""

    library = "omega-qvla"

    def __init__(self, weight_bits: int, input_bits: int, group: int) -> None:
        self.weight_bits, self.input_bits, self._group = weight_bits, input_bits, group
        self.name = f"omega-qvla W{weight_bits}A{input_bits}, groups of {group}"
        self.largest_error = 0.25 if input_bits <= 4 else 0.15
        recipe = with_settings(
            read_recipe("omega-int4"),
            [
                f"weight.bits={weight_bits}",
                f"activation.bits={input_bits}",
                f"weight.group_size={group}",
                f"activation.group_size={group}",
            ],
        )
        (self._spec,) = (rule.quantize for rule in recipe.rules if rule.part == "action" and rule.quantize)
        self._latest: tuple[Tensor, PackedSite] | None = None

    def prepare(self, weight: Tensor, tokens: int | None, threads: int) -> Multiply:
        (linear,) = quantized_linears(self._quantized(weight), DenoisingStep(1), "integer")
        return linear

    def check(self, weight: Tensor, x: Tensor, multiply: Multiply) -> None:
        """Its codes multiplied as 64-bit integers and scaled in the same order must give the same bits."""
        super().check(weight, x, multiply)
        assert isinstance(multiply, QuantizedLinear)
        operand, (packed,) = multiply.source(x), self._quantized(weight).linears
        assert operand.codes is not None and operand.scale is not None
        codes = unpack(packed.packed, self.weight_bits)
        exact = GroupedWeight(codes, packed.scale, x.shape[1] // self._group, "reference", self.weight_bits)
        rows = torch.linspace(0, len(x) - 1, _CHECKED_ROWS).long()
        if not torch.equal(multiply(x)[rows], exact.matmul(operand.codes[rows], operand.scale[rows])):
            raise InexactError(f"{self.name} does not give the bits that 64-bit integers give")

    def _quantized(self, weight: Tensor) -> PackedSite:
        """The weight as a site of its own; remembered until another one comes."""
        if self._latest is None or self._latest[0] is not weight:
            channels = weight.shape[1]
            statistics = SiteStatistics("site", Needs())
            statistics.add(torch.randn(2 * self._group, channels, generator=torch.Generator().manual_seed(0)), 0)
            site = PlannedSite("site", "action", "block", channels, ("site",), 0)
            packed = quantize_site(site, self._spec, {"site": weight}, {}, Found(statistics), 1)
            self._latest = weight, packed
        return self._latest[1]


class TorchFloat(Contender):
    """`torch.nn.functional.linear`."""

    library = "torch"

    def __init__(self, dtype: torch.dtype) -> None:
        bits = 8 * dtype.itemsize
        self.dtype, self.weight_bits, self.input_bits = dtype, bits, bits
        self.name = f"torch {str(dtype).removeprefix('torch.')}"
        self.largest_error = 1e-5 if dtype == torch.float32 else 1e-2

    def prepare(self, weight: Tensor, tokens: int | None, threads: int) -> Multiply:
        held = weight.to(self.dtype)
        return lambda x: torch.nn.functional.linear(x.to(self.dtype), held).float()


class TorchInteger(Contender):
    """`torch._int_mm`, one scale for each token and output."""

    name, library, weight_bits, input_bits, largest_error = "torch int_mm W8A8", "torch", 8, 8, 0.15

    def prepare(self, weight: Tensor, tokens: int | None, threads: int) -> Multiply:
        codes, scale = _rows_in_bytes(weight)
        transposed, by_output = codes.t(), scale.t()

        def multiply(x: Tensor) -> Tensor:
            by_token = peak_scale(x, 8)
            return torch._int_mm(quantize(x, by_token, 8), transposed) * by_token * by_output

        return multiply


class OneDnn(Contender):
    """oneDNN's quantized linear, through torch: one scale for the whole input and one for each output. Inputs are
    unsigned: for signed ones it has no fast product on processors with VNNI."""

    name, library, weight_bits, input_bits, largest_error = "oneDNN qlinear W8A8", "torch", 8, 8, 0.3

    def prepare(self, weight: Tensor, tokens: int | None, threads: int) -> Multiply:
        codes, scale = _rows_in_bytes(weight)
        highest = qmax(_safe_bits())
        packed = torch.ops.onednn.qlinear_prepack(codes, None if tokens is None else [tokens, weight.shape[1]])
        scale, zero = scale.flatten(), torch.zeros(len(scale), dtype=torch.int32)

        def multiply(x: Tensor) -> Tensor:
            of_input = float(x.abs().amax()) / highest
            rounded = (x * (1 / of_input)).round_().add_(_ZERO_POINT).to(torch.uint8)
            return torch.ops.onednn.qlinear_pointwise(
                rounded, of_input, _ZERO_POINT, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
            )

        return multiply


class OnnxRuntime(Contender):
    """A model of one product in ONNX Runtime."""

    library = "onnxruntime"

    def prepare(self, weight: Tensor, tokens: int | None, threads: int) -> Multiply:
        onnxruntime, onnx = _library("onnxruntime"), _library("onnx")
        helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
        out, channels = weight.shape
        node, constants = self._node(weight)
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("x", float32, [tokens or "tokens", channels])],
            [helper.make_tensor_value_info("y", float32, [tokens or "tokens", out])],
            [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        opsets = [helper.make_opsetid("", _ONNX_OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_ONNX_IR)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # Its threads would go on spinning after a product, and take the processor from whoever is measured next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    @abstractmethod
    def _node(self, weight: Tensor) -> tuple[Any, dict[str, np.ndarray]]:
        """The operator from x to y, and its constants by name."""


class OnnxFloat(OnnxRuntime):
    """Packed once, when the session is made."""

    name, weight_bits, input_bits, largest_error = "ONNX Runtime float32", 32, 32, 1e-5

    def _node(self, weight: Tensor) -> tuple[Any, dict[str, np.ndarray]]:
        return _library("onnx").helper.make_node("MatMul", ["x", "w"], ["y"]), {"w": weight.t().contiguous().numpy()}


class OnnxDynamic(OnnxRuntime):
    """DynamicQuantizeMatMul: one scale for the whole input, one for each output."""

    name, weight_bits, input_bits, largest_error = "ONNX Runtime DynamicQuantizeMatMul W8A8", 8, 8, 0.3

    def _node(self, weight: Tensor) -> tuple[Any, dict[str, np.ndarray]]:
        codes, scale = _rows_in_bytes(weight, _safe_bits())
        constants = {
            "w": codes.t().contiguous().numpy(),
            "scale": scale.flatten().numpy(),
            "zero": np.zeros(len(scale), np.int8),
        }
        inputs = ["x", "w", "scale", "zero"]
        node = _library("onnx").helper.make_node("DynamicQuantizeMatMul", inputs, ["y"], domain="com.microsoft")
        return node, constants


class OnnxFourBits(OnnxRuntime):
    """MatMulNBits, which rounds inputs to eight bits inside (accuracy level 4)."""

    name, weight_bits, input_bits = f"ONNX Runtime MatMulNBits W4A8, groups of {_GROUP}", 4, 8
    largest_error = 0.15

    def _node(self, weight: Tensor) -> tuple[Any, dict[str, np.ndarray]]:
        out, channels = weight.shape
        groups = channels // _GROUP
        scale = peak_scale(weight, 4, _GROUP)
        unsigned = (quantize(weight, scale, 4) + 8).to(torch.uint8).view(out, groups, _GROUP // 2, 2)
        packed = unsigned[..., 0] | unsigned[..., 1] << 4
        node = _library("onnx").helper.make_node(
            "MatMulNBits",
            ["x", "w", "scale"],
            ["y"],
            domain="com.microsoft",
            K=channels,
            N=out,
            bits=4,
            block_size=_GROUP,
            accuracy_level=4,
        )
        return node, {"w": packed.numpy(), "scale": scale.numpy()}


class OpenVino(Contender):
    """OpenVINO with weights of four bits, which rounds inputs to eight (dynamic quantization)."""

    name, library, weight_bits, input_bits = f"OpenVINO W4A8, groups of {_GROUP}", "openvino", 4, 8
    largest_error = 0.15

    def prepare(self, weight: Tensor, tokens: int | None, threads: int) -> Multiply:
        if tokens is None:  # with a dynamic shape, 2026.4.1 multiplied three tokens right and a single one wrong
            raise ValueError("OpenVINO is compared with a fixed number of tokens")
        openvino, ops = _library("openvino"), _library("openvino.opset13")
        out, channels = weight.shape
        groups = channels // _GROUP
        scale = peak_scale(weight, 4, _GROUP)
        nibbles = (quantize(weight, scale, 4).view(-1, 2) & 15).to(torch.uint8)
        packed = (nibbles[:, 0] | nibbles[:, 1] << 4).numpy()
        codes = ops.constant(openvino.Tensor(packed, [out, groups, _GROUP], openvino.Type.i4))
        grouped = ops.multiply(ops.convert(codes, "f16"), ops.constant(scale[..., None].half().numpy()))
        whole = ops.convert(ops.reshape(grouped, [out, channels], special_zero=False), "f32")
        x = ops.parameter([tokens, channels], np.float32, name="x")
        model = openvino.Model([ops.matmul(x, whole, False, True)], [x])
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": _GROUP,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        return partial(_infer, request)


def _library(name: str) -> Any:
    """A module of a library that only comparisons need. Raises `ImportError` that says how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is missing: install omega-qvla[bench] to compare with other libraries") from error


def _infer(request: Any, x: Tensor) -> Tensor:
    return torch.from_numpy(request.infer([x.numpy()], share_inputs=True, share_outputs=True)[0])


def _safe_bits() -> int:
    """Of one factor of products of bytes. Without VNNI pairs of them are added in 16 bits, which those of seven bits
    cannot overflow; so say the documentations of oneDNN and of ONNX Runtime."""
    return 8 if "avx512-vnni" in native.available() else 7


def _rows_in_bytes(weight: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and scales float32 [out, 1]."""
    scale = peak_scale(weight, bits)
    return quantize(weight, scale, bits), scale
