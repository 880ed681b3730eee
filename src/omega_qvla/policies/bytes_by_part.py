"""What the parts of a policy take on disk, quantized or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path

from omega_qvla.pack.checkpoint import is_checkpoint, read_manifest
from omega_qvla.pack.manifest import KEPT_FILE, QUANTIZED_FILE
from omega_qvla.pack.stream import sources_in
from omega_qvla.policies import outline_policy
from omega_qvla.policies.layouts import recognized

REST = "all else"
"""Embeddings, norms, heads and other tensors outside the linears of the parts; configuration and tokenizer."""


def bytes_by_part(directory: Path) -> dict[str, int]:
    """Bytes of the linears of vision, language and action, with all that is stored for them, and of the rest; their
    sum is what the directory takes.

    Only headers are read. Raises `CheckpointError` if the directory holds no policy.
    """
    sizes, owners = _quantized(directory) if is_checkpoint(directory) else _floating(directory)
    found = Counter(dict.fromkeys(("vision", "language", "action"), 0))
    for name, size in sizes.items():
        part = owners.get(name.rpartition(".")[0])
        if part is not None:
            found[part] += size
    total = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    return {**{part: size for part, size in found.items() if size}, REST: total - found.total()}


Sizes = tuple[Mapping[str, int], Mapping[str, str | None]]
"""Bytes of each tensor, and the part of each linear or site that tensors are named after."""


def _quantized(directory: Path) -> Sizes:
    plan = read_manifest(directory).plan
    files = [directory / name for name in (QUANTIZED_FILE, KEPT_FILE)]
    sizes = {name: source.nbytes for file in files for name, source in sources_in(file).items()}
    return sizes, {site.name: site.part for site in plan.sites} | {each.name: each.part for each in plan.linears}


def _floating(directory: Path) -> Sizes:
    stored = recognized(directory).tensors()
    sizes = {name: prod(stored.shape(name)) * stored.dtype(name).itemsize for name in stored.names()}
    return sizes, {linear: site.part for site in outline_policy(directory).sites() for linear in site.linears}
