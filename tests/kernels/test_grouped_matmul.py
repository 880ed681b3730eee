"""Law 3: every execution's accumulators are the plain int64 product, and all results agree bit for bit."""

from __future__ import annotations

import random as python_random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from omega_qvla.kernels.grouped_matmul import Execution, GroupedWeight, simulated

EXECUTIONS: tuple[Execution, ...] = ("reference", "integer", "simulated")


@dataclass(frozen=True)
class Case:
    tokens: int
    outputs: int
    width: int
    groups: int
    bits: int
    saturated: bool
    weight_scale_per_group: bool
    token_scale_per_group: bool
    one_token_scale: bool

    def codes(self, rows: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        limit = 2 ** (self.bits - 1) - 1
        shape = rows, self.width * self.groups
        if self.saturated:
            return (torch.randint(0, 2, shape, generator=generator) * 2 - 1).mul_(limit).to(torch.int8)
        return torch.randint(-limit, limit + 1, shape, generator=generator, dtype=torch.int8)

    def scales(self, rows: int, per_group: bool, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(rows, self.groups if per_group else 1, generator=generator) + 0.01


def random_case(seed: int) -> Case:
    draw = python_random.Random(seed)
    return Case(
        tokens=draw.choice([1, 2, 3, 7, 8, 17, 33]),
        outputs=draw.choice([1, 2, 5, 8, 31, 32, 65]),
        width=draw.choice([1, 2, 3, 15, 16, 17, 63, 64, 100, 129]),
        groups=draw.randint(1, 4),
        bits=draw.randint(2, 8),
        saturated=draw.random() < 0.3,
        weight_scale_per_group=draw.random() < 0.5,
        token_scale_per_group=draw.random() < 0.5,
        one_token_scale=draw.random() < 0.2,
    )


@pytest.mark.parametrize("seed", range(200))
def test_accumulators_are_exact_and_results_agree_bit_for_bit(seed: int) -> None:
    case = random_case(seed)
    x, w = case.codes(case.tokens, seed + 1000), case.codes(case.outputs, seed + 2000)
    scale_rows = 1 if case.one_token_scale else case.tokens
    x_scale = case.scales(scale_rows, case.token_scale_per_group, seed + 3000)
    w_scale = case.scales(case.outputs, case.weight_scale_per_group, seed + 4000)
    expected = GroupedWeight(w, w_scale, case.groups, "reference", case.bits).matmul(x, x_scale)
    for execution in EXECUTIONS:
        grouped = GroupedWeight(w, w_scale, case.groups, execution, case.bits)
        for group, accumulate in enumerate(grouped.groups):
            columns = slice(group * case.width, (group + 1) * case.width)
            exact = x[:, columns].long() @ w[:, columns].long().t()
            assert torch.equal(accumulate(x[:, columns]).long(), exact), (execution, case)
        result = grouped.matmul(x, x_scale)
        assert result.dtype == torch.float32 and torch.equal(result, expected), (execution, case)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_against_dequantized_operands_in_float64(execution: Execution) -> None:
    case = Case(9, 20, 48, 3, 4, False, True, True, False)
    x, w = case.codes(9, 0), case.codes(20, 1)
    x_scale, w_scale = case.scales(9, True, 2), case.scales(20, True, 3)
    wide_x = x.double() * x_scale.double().repeat_interleave(48, 1)
    wide_w = w.double() * w_scale.double().repeat_interleave(48, 1)
    result = GroupedWeight(w, w_scale, 3, execution, 4).matmul(x, x_scale)
    bound = 6 * torch.finfo(torch.float32).eps * (wide_x.abs() @ wide_w.abs().t())
    assert ((result.double() - wide_x @ wide_w.t()).abs() <= bound).all()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_as_wide_as_layers_get(execution: Execution) -> None:
    case = Case(3, 5, 16_384, 1, 4, True, False, False, False)
    x = case.codes(3, 0)
    w = x[:1].expand(5, -1).contiguous()  # the largest sum that four bits can have
    ones = torch.ones(5, 1), torch.ones(3, 1)
    result = GroupedWeight(w, ones[0], 1, execution, 4).matmul(x, ones[1])
    assert torch.equal(result.long(), x.long() @ w.long().t())
    assert result[0, 0] == 49 * 16_384


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_results_do_not_depend_on_the_batch(execution: Execution) -> None:
    case = Case(16, 24, 64, 2, 4, False, True, True, False)
    x, x_scale = case.codes(16, 0), case.scales(16, True, 1)
    grouped = GroupedWeight(case.codes(24, 2), case.scales(24, True, 3), 2, execution, 4)
    rows = [grouped.matmul(x[i : i + 1], x_scale[i : i + 1]) for i in range(16)]
    assert torch.equal(torch.cat(rows), grouped.matmul(x, x_scale))


def test_sums_that_float32_cannot_count_agree_all_the_same() -> None:
    codes = torch.full((1, 2049), 127, dtype=torch.int8)
    one = torch.ones(1, 1)
    results = [GroupedWeight(codes, one, 1, execution, 8).matmul(codes, one) for execution in EXECUTIONS]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_single_channel(execution: Execution, bits: int) -> None:
    case = Case(17, 31, 1, 1, bits, False, False, False, False)
    x, w = case.codes(17, 0), case.codes(31, 1)
    result = GroupedWeight(w, torch.ones(31, 1), 1, execution, bits).matmul(x, torch.ones(17, 1))
    assert torch.equal(result.long(), x.long() * w.long().t())


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_the_lowest_codes_of_all(bits: int) -> None:
    weight = torch.full((3, 64), -(2 ** (bits - 1)), dtype=torch.int8)
    x = torch.tensor([[-128], [127]], dtype=torch.int8).repeat(1, 64)
    for execution in EXECUTIONS:
        result = GroupedWeight(weight, torch.ones(3, 1), 1, execution, bits).matmul(x, torch.ones(2, 1))
        assert torch.equal(result.long(), x.long() @ weight.long().t()), execution


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 1024, 1040, 4096, 20_000])
def test_simulation_counts_in_float32_only_where_that_is_exact(width: int, bits: int) -> None:
    largest = width * 128 * 2 ** (bits - 1)
    assert (simulated.dtype_of(width, bits) == torch.float32) == (largest <= 2**24)
    weight = torch.zeros(2, width, dtype=torch.int8)
    grouped = GroupedWeight(weight, torch.ones(2, 1), 1, "simulated", bits)
    assert grouped.nbytes == weight.to(simulated.dtype_of(width, bits)).nbytes + grouped.scale.nbytes


def test_unknown_execution_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown execution 'magic'; there are reference, integer, simulated"):
        GroupedWeight(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 1), 1, "magic", 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(("groups", "scales"), [(3, 1), (3, 3), (2, 3), (4, 2)])
def test_groups_that_do_not_fit_are_refused(groups: int, scales: int) -> None:
    with pytest.raises(ValueError, match=rf"{groups} groups do not fit codes \[2, 8\] and scales"):
        GroupedWeight(torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, scales), groups, "integer", 4)


def test_integer_execution_needs_a_cpu() -> None:
    codes = torch.zeros(2, 8, dtype=torch.int8, device="meta")
    with pytest.raises(ValueError, match="runs on the CPU, not on meta; use execution 'simulated'"):
        GroupedWeight(codes, torch.ones(2, 1), 1, "integer", 4)
