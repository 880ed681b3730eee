"""Linears whose weights stay on disk: read when they are called, forgotten when others need the room.

So a policy runs in full precision on a machine that could not hold it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from omega_qvla.policies.stored import StoredTensors


class StreamedWeights:
    """The weights of a checkpoint, of which the most recently used stay in memory."""

    def __init__(self, stored: StoredTensors, capacity: int) -> None:
        """`capacity`: bytes that may stay; the weight that was asked for last always does."""
        self.stored, self.capacity = stored, capacity
        self.rehearsing = False
        """Whether linears answer with zeros."""
        self._recent: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight as the policy runs with it, rounded to `dtype`, in float32.

        Raises `CheckpointError` if it is not finite.
        """
        if name in self._recent:
            self._recent.move_to_end(name)
            return self._recent[name]
        weight = self.stored.read(name).to(dtype).float()
        self._recent[name] = weight
        self._bytes += weight.nbytes
        while self._bytes > self.capacity and len(self._recent) > 1:
            _, forgotten = self._recent.popitem(last=False)
            self._bytes -= forgotten.nbytes
        return weight


class StreamedLinear(nn.Linear):
    """A linear without a weight of its own: `weight` has shape and dtype, but no values.

    Products are computed in float32 and rounded to the input's dtype: CPUs multiply bfloat16 slower.
    """

    def __init__(self, linear: nn.Linear, key: str, weights: StreamedWeights) -> None:
        dtype = linear.weight.dtype
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, "meta", dtype)
        self.key, self._weights = key, weights

    def read(self) -> Tensor:
        """The weight as the checkpoint stores it, [out, in]. Raises `CheckpointError` if it is not finite."""
        return self._weights.stored.read(self.key)

    def forward(self, x: Tensor) -> Tensor:
        if self._weights.rehearsing:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        weight = self._weights.get(self.key, self.weight.dtype)
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(x.float(), weight, bias).to(x.dtype)


def stream_linears(module: nn.Module, names: Iterable[str], weights: StreamedWeights) -> set[str]:
    """Put streamed linears in the place of those called `names`; returns the keys of their weights."""
    keys = set()
    for name in names:
        parent, _, leaf = name.rpartition(".")
        key, linear = f"{name}.weight", module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(module.get_submodule(parent), leaf, StreamedLinear(linear, key, weights))
        keys.add(key)
    return keys
