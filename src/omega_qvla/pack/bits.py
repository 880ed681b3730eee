"""Signed codes packed without gaps.

Code j of a row takes bits j·b ... (j+1)·b - 1 of the row's bytes, least significant first, in two's
complement. At four bits that is two codes a byte, the even column in the low nibble.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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
    return torch.from_numpy(np.packbits(planes.reshape(len(codes), -1), axis=1, bitorder="little"))


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes int8 [rows, in] from uint8 [rows, in · bits / 8]."""
    if bits == 8:
        return packed.to(torch.int8)
    if bits == 4:
        unsigned = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    else:
        planes = np.unpackbits(packed.numpy(), axis=1, bitorder="little").reshape(len(packed), -1, bits)
        unsigned = torch.from_numpy((planes << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8))
    signed = unsigned.to(torch.int16)
    return torch.where(signed >= 2 ** (bits - 1), signed - 2**bits, signed).to(torch.int8)
