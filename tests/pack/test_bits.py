import pytest
import torch

from omega_qvla.pack.bits import pack, unpack


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_round_trip(bits: int, rows: int) -> None:
    limit = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-limit, limit, (rows, 64), generator=generator, dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, 64 * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rows_that_are_unpacked_in_parts(bits: int) -> None:
    packed = torch.randint(0, 256, (3, bits * 2**17), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes = unpack(packed, bits)
    assert torch.equal(codes, torch.cat([unpack(row[None], bits) for row in packed]))
    assert torch.equal(pack(codes, bits), packed)


def test_unpacking_leaves_the_packed_codes_alone() -> None:
    for bits in (2, 3, 4, 8):
        packed = torch.full((2, 24), 0xB4, dtype=torch.uint8)
        unpack(packed, bits).fill_(1)
        assert (packed == 0xB4).all()


def test_four_bits_have_the_even_column_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, -1, 7, -8]], dtype=torch.int8)
    assert pack(codes, 4).tolist() == [[0xF1, 0x87]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_documented_layout(bits: int) -> None:
    """Code j takes bits j·b ... (j+1)·b - 1, least significant first, in two's complement."""
    codes = [-1, 0, 1, -2, 1, -1, -2, 0]
    row = sum((code % 2**bits) << (j * bits) for j, code in enumerate(codes))
    packed = pack(torch.tensor([codes], dtype=torch.int8), bits)
    assert bytes(packed[0].tolist()) == row.to_bytes(bits, "little")


@pytest.mark.parametrize(("bits", "code"), [(4, 8), (4, -9), (2, 2), (3, -5), (7, 64)])
def test_codes_that_do_not_fit_are_refused(bits: int, code: int) -> None:
    codes = torch.zeros(2, 8, dtype=torch.int8)
    codes[1, 3] = code
    with pytest.raises(ValueError, match=f"{code} .*do not fit {bits} bits"):
        pack(codes, bits)


def test_rows_that_do_not_fill_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="7 codes of 4 bits do not fill whole bytes"):
        pack(torch.zeros(2, 7, dtype=torch.int8), 4)
