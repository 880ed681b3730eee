"""Weights whose rows have widths of their own, packed without gaps.

Rows of one width stand together, wide ones first, in ascending order within a width. Rows of 16 bits are
bfloat16 values, narrower ones codes as `pack.bits` packs them; rows of 0 bits take nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.pack.bits import pack, unpack
from omega_qvla.spec import CHANNEL_WIDTHS

_NAMED = ", ".join(map(str, CHANNEL_WIDTHS))


def pack_rows(rows: dict[int, Tensor]) -> Tensor:
    """uint8 [bytes] from codes int8 [rows, in] by width; those of width 16 are bfloat16 values.

    Raises `ValueError` for a width that is not one of CHANNEL_WIDTHS.
    """
    if unknown := set(rows) - set(CHANNEL_WIDTHS):
        raise ValueError(f"rows of {min(unknown)} bits cannot be packed; there are {_NAMED}")
    parts = [_packed(rows[width], width).flatten() for width in CHANNEL_WIDTHS if width in rows and width]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def unpack_rows(packed: Tensor, widths: Tensor, in_features: int) -> dict[int, Tensor]:
    """What `pack_rows` packed, from the bytes and the width uint8 [out] of every row; widths without rows are
    left out, and so is width 0.

    Raises `ValueError` if the bytes are not as many as the widths need.
    """
    wanted = packed_bytes(widths, in_features)
    if packed.numel() != wanted:
        raise ValueError(f"rows of these widths take {wanted} bytes, not {packed.numel()}")
    found: dict[int, Tensor] = {}
    start = 0
    for width in CHANNEL_WIDTHS[:-1]:
        count = int((widths == width).sum())
        if not count:
            continue
        size = count * in_features * width // 8
        part = packed[start : start + size].view(count, -1)
        found[width] = part.clone().view(torch.bfloat16) if width == 16 else unpack(part, width)
        start += size
    return found


def packed_bytes(widths: Tensor, in_features: int) -> int:
    """Bytes that rows of these widths take. Raises `ValueError` for a width that is not one of CHANNEL_WIDTHS."""
    present = set(widths.unique().tolist())
    if unknown := present - set(CHANNEL_WIDTHS):
        raise ValueError(f"a row has {min(unknown)} bits; there are {_NAMED}")
    return int(widths.long().sum()) * in_features // 8


def rows_of(widths: Tensor, width: int) -> Tensor:
    """Indices, int64, of the rows of one width, in the order in which they are packed."""
    return (widths == width).nonzero().flatten()


def _packed(rows: Tensor, width: int) -> Tensor:
    return rows.to(torch.bfloat16).contiguous().view(torch.uint8) if width == 16 else pack(rows, width)
