from collections.abc import Callable

import pytest
import torch

from omega_qvla.numerics.permutation import interleaved, zigzag

Permutation = Callable[[torch.Tensor, int], torch.Tensor]
PERMUTATIONS: list[Permutation] = [zigzag, interleaved]


def random_energy(channels: int, seed: int) -> torch.Tensor:
    return torch.randn(channels, generator=torch.Generator().manual_seed(seed)).square()


@pytest.mark.parametrize("permutation", PERMUTATIONS)
@pytest.mark.parametrize(("channels", "block_size"), [(8, 4), (64, 16), (96, 32), (64, 64), (6, 1), (9, 3)])
def test_every_channel_appears_once(permutation: Permutation, channels: int, block_size: int) -> None:
    order = permutation(random_energy(channels, 0), block_size)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(channels))


def test_zigzag_by_hand() -> None:
    """Ranks 0..7 are dealt 0 1 | 1 0 | 0 1 | 1 0 to two blocks: {0, 3, 4, 7} and {1, 2, 5, 6}."""
    assert zigzag(torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]), 4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


def test_zigzag_ranks_by_energy() -> None:
    energy = torch.tensor([1.0, 8, 2, 7, 3, 6, 4, 5])
    ranked = energy.argsort(descending=True)
    assert zigzag(energy, 4).tolist() == ranked[[0, 3, 4, 7, 1, 2, 5, 6]].tolist()


def test_interleaved_by_hand() -> None:
    """Ranks 0..7: largest, smallest, second largest, second smallest; an odd one out comes last."""
    energy = torch.tensor([1.0, 8, 2, 7, 3, 6, 4, 5])
    ranked = energy.argsort(descending=True)
    assert interleaved(energy, 4).tolist() == ranked[[0, 7, 1, 6, 2, 5, 3, 4]].tolist()
    assert interleaved(torch.tensor([5.0, 4, 3, 2, 1]), 5).tolist() == [0, 4, 1, 3, 2]


def test_interleaved_blocks_go_from_the_extremes_to_the_middle() -> None:
    """The released code's blocks of 64: the first has the 32 largest and the 32 smallest channels."""
    energy = random_energy(256, 0)
    first = interleaved(energy, 64)[:64]
    ranked = energy.argsort(descending=True)
    assert set(first.tolist()) == set(ranked[:32].tolist()) | set(ranked[-32:].tolist())


@pytest.mark.parametrize("seed", range(5))
def test_blocks_get_equal_shares(seed: int) -> None:
    energy = random_energy(256, seed)

    def spread(values: torch.Tensor) -> float:
        return float(values.view(-1, 32).sum(1).std())

    assert spread(energy[zigzag(energy, 32)]) < 0.5 * spread(energy)


def test_equal_energies_keep_their_order() -> None:
    assert zigzag(torch.ones(8), 4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]
    assert interleaved(torch.ones(8), 4).tolist() == [0, 7, 1, 6, 2, 5, 3, 4]


@pytest.mark.parametrize("permutation", PERMUTATIONS)
def test_blocks_that_do_not_divide_are_refused(permutation: Permutation) -> None:
    with pytest.raises(ValueError, match="blocks of 5 channels do not divide an input of 8"):
        permutation(torch.ones(8), 5)
