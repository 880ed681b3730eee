"""Rows of mixed widths take exactly the bits that they have, and come back as they were."""

import pytest
import torch
from torch import Tensor

from omega_qvla.pack.rows import pack_rows, packed_bytes, rows_of, unpack_rows

WIDTHS = torch.tensor([4, 16, 0, 2, 8, 4, 2, 0, 16], dtype=torch.uint8)
WIDTH = 12


def random_rows(widths: Tensor) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows: dict[int, Tensor] = {}
    for width in (16, 8, 4, 2):
        shape = (int((widths == width).sum()), WIDTH)
        if not shape[0]:
            continue
        if width == 16:
            rows[width] = torch.randn(shape, generator=generator).to(torch.bfloat16)
        else:
            limit = 2 ** (width - 1)
            rows[width] = torch.randint(-limit, limit, shape, generator=generator).to(torch.int8)
    return rows


@pytest.mark.parametrize("widths", [WIDTHS, WIDTHS[:1], torch.full((3,), 16, dtype=torch.uint8), WIDTHS.flip(0)])
def test_rows_come_back(widths: Tensor) -> None:
    rows = random_rows(widths)
    packed = pack_rows(rows)
    assert packed.dtype == torch.uint8
    assert 8 * len(packed) == WIDTH * int(widths.long().sum()) == 8 * packed_bytes(widths, WIDTH)
    found = unpack_rows(packed, widths, WIDTH)
    assert found.keys() == rows.keys()
    assert all(torch.equal(found[width], rows[width]) for width in rows)


def test_pruned_rows_take_nothing() -> None:
    widths = torch.zeros(5, dtype=torch.uint8)
    assert len(pack_rows({})) == 0 and unpack_rows(torch.empty(0, dtype=torch.uint8), widths, WIDTH) == {}


def test_which_rows_have_a_width() -> None:
    assert rows_of(WIDTHS, 4).tolist() == [0, 5] and rows_of(WIDTHS, 0).tolist() == [2, 7]


def test_unknown_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 3 bits cannot be packed; there are 16, 8, 4, 2, 0"):
        pack_rows({3: torch.zeros(1, 8, dtype=torch.int8)})
    with pytest.raises(ValueError, match="a row has 5 bits"):
        packed_bytes(torch.tensor([4, 5], dtype=torch.uint8), WIDTH)


def test_bytes_of_another_number_are_refused() -> None:
    packed = pack_rows(random_rows(WIDTHS))
    with pytest.raises(ValueError, match=f"take {len(packed)} bytes, not {len(packed) - 1}"):
        unpack_rows(packed[:-1], WIDTHS, WIDTH)
