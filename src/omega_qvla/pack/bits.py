"""Signed codes packed without gaps.

Code j of a row takes bits j·b ... (j+1)·b - 1 of the row's bytes, least significant first, in two's
complement. At four bits that is two codes a byte, the even column in the low nibble.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_PART_BYTES = 2**19
"""Rows are unpacked in parts that stay in the processor's cache from one pass over them to the next."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, in · bits / 8] from codes int8 [rows, in].

    Raises `ValueError` if a code does not fit or a row does not fill whole bytes.
    """
    limit = 2 ** (bits - 1)
    if codes.numel() and (int(codes.min()) < -limit or int(codes.max()) >= limit):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits")
    if codes.shape[1] * bits % 8:
        raise ValueError(f"{codes.shape[1]} codes of {bits} bits do not fill whole bytes")
    unsigned = (codes & (2**bits - 1)).to(torch.uint8)
    if bits == 8:
        return unsigned
    if bits == 4:
        return unsigned[:, ::2] | (unsigned[:, 1::2] << 4)
    planes = (unsigned.numpy()[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return torch.from_numpy(np.packbits(planes.reshape(len(codes), codes.shape[1] * bits), axis=1, bitorder="little"))


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes int8 [rows, in] from uint8 [rows, in · bits / 8]."""
    if bits == 8:
        return packed.to(torch.int8)
    codes = torch.empty(len(packed), packed.shape[1] * 8 // bits, dtype=torch.int8)
    rows = max(1, _PART_BYTES // max(1, packed.shape[1]))
    sign = 2 ** (bits - 1)
    for source, part in zip(packed.split(rows), codes.split(rows), strict=True):
        _spread(source, part, bits)
        part ^= sign  # two's complement: what stands above the sign bit is filled with it
        part -= sign
    return codes


def _spread(packed: Tensor, codes: Tensor, bits: int) -> None:
    """Write the bits of every code of packed uint8 [rows, bytes] into a byte of its own, int8 [rows, in]."""
    if bits == 4:
        words = codes.view(torch.int16).copy_(packed)
        words |= words << 4
        words &= 0x0F0F
    elif bits == 2:
        words = codes.view(torch.int32).copy_(packed)
        words |= words << 12
        words &= 0x000F000F
        words |= words << 6
        words &= 0x03030303
    else:
        planes = torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, bitorder="little"))
        unsigned = codes.view(torch.uint8).zero_()
        for plane in range(bits):
            unsigned |= planes[:, plane::bits] << plane
