import pytest
import torch

from omega_qvla.numerics.permutation import zigzag


def random_energy(channels: int, seed: int) -> torch.Tensor:
    return torch.randn(channels, generator=torch.Generator().manual_seed(seed)).square()


@pytest.mark.parametrize(("channels", "block_size"), [(8, 4), (64, 16), (96, 32), (64, 64), (6, 1)])
def test_every_channel_appears_once(channels: int, block_size: int) -> None:
    order = zigzag(random_energy(channels, 0), block_size)
    assert sorted(order.tolist()) == list(range(channels))


def test_zigzag_by_hand() -> None:
    """Ranks 0..7 are dealt 0 1 | 1 0 | 0 1 | 1 0 to two blocks: {0, 3, 4, 7} and {1, 2, 5, 6}."""
    assert zigzag(torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]), 4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


def test_zigzag_ranks_by_energy() -> None:
    energy = torch.tensor([1.0, 8, 2, 7, 3, 6, 4, 5])
    ranked = energy.argsort(descending=True)
    assert zigzag(energy, 4).tolist() == ranked[[0, 3, 4, 7, 1, 2, 5, 6]].tolist()


@pytest.mark.parametrize("seed", range(5))
def test_blocks_get_equal_shares(seed: int) -> None:
    energy = random_energy(256, seed)

    def spread(values: torch.Tensor) -> float:
        return float(values.view(-1, 32).sum(1).std())

    assert spread(energy[zigzag(energy, 32)]) < 0.5 * spread(energy)


def test_equal_energies_keep_their_order() -> None:
    assert torch.equal(zigzag(torch.ones(32), 8), zigzag(torch.ones(32), 8))


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 5 channels do not divide an input of 8"):
        zigzag(torch.ones(8), 5)
