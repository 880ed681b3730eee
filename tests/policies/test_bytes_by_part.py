"""Bytes of the parts of a policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from omega_qvla.pack.inspect import inspect
from omega_qvla.policies.bytes_by_part import REST, bytes_by_part
from omega_qvla.policies.pi05 import PI05


def files(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_in_floating_point(checkpoint: Path, floating: PI05) -> None:
    found = bytes_by_part(checkpoint)
    assert sum(found.values()) == files(checkpoint)
    stored = load_file(checkpoint / "model.safetensors")
    for part in ("language", "action"):
        linears = [name for site in floating.sites() if site.part == part for name in site.linears]
        tensors = [tensor for name, tensor in stored.items() if name.rpartition(".")[0] in linears]
        assert found[part] == sum(tensor.nbytes for tensor in tensors) > 0


@pytest.mark.parametrize("recipe", ["rtn", "omega-qvla"])
def test_quantized(recipe: str, quantized: Callable[[str], Path]) -> None:
    found, whole = bytes_by_part(quantized(recipe)), inspect(quantized(recipe))
    assert sum(found.values()) == files(quantized(recipe))
    linears = sum(linear.bytes for linear in whole.linears if linear.part in found)
    beside = whole.rotation_bytes + whole.permutation_bytes + whole.factor_bytes + whole.step_table_bytes
    assert sum(size for part, size in found.items() if part != REST) == linears + beside
