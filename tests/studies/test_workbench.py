"""What the bench measures against direct computation."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from omega_qvla.evaluation.recording import RecordedObservation
from omega_qvla.numerics.quantizer import dequantize, quantize, weight_scale
from omega_qvla.quantization import Quantized, build_plan
from omega_qvla.spec import RecipeError, read_recipe, with_settings
from omega_qvla.studies.workbench import Layer, Workbench, answers, layer_records, output_errors
from toy_policy import ToyPolicy, recipe, rules_for_both, toy_observations

WEIGHTS_ONLY = {"weight": {"bits": 4}, "activation": {"bits": 16}}


def toy_bench(held_out: int = 3) -> Workbench:
    observations = toy_observations(held_out, seed=1)
    records = [RecordedObservation("task", 5, i, observations[i : i + 1]) for i in range(held_out)]
    return Workbench(ToyPolicy(), toy_observations(4), tuple(records))


def test_layers_by_part_depth_and_kind(bench: Workbench) -> None:
    found = Counter((layer.part, layer.depth) for layer in bench.layers.values())
    assert found == {(part, depth): 7 for part in ("language", "action") for depth in (0, 1)}
    assert toy_bench().layers["action.down"] == Layer("action", 0, "down")


def test_inputs_are_held_out_and_by_step() -> None:
    found = toy_bench(held_out=3).inputs
    assert found["language.q"][None].shape == (3, 16)  # one token for each held-out observation
    assert found["language.q"] is found["language.k"]
    assert {step: x.shape for step, x in found["action.down"].items()} == dict.fromkeys(range(4), (9, 32))
    np.testing.assert_array_equal(found["language.q"][None], toy_observations(3, seed=1).state)


def test_output_error_against_direct_computation() -> None:
    bench = toy_bench()
    errors = bench.output_errors(bench.quantize(rules_for_both(WEIGHTS_ONLY)))
    for name, error in errors.items():
        linear = bench.policy.module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach().double()
        scale = weight_scale(weight, 4)
        change = dequantize(quantize(weight, scale, 4), scale) - weight
        squared, power = 0.0, 0.0
        for step, x in bench.inputs[name].items():
            assert error.squared[step] == pytest.approx((x.double() @ change.t()).square().sum().item(), rel=1e-3)
            squared += error.squared[step]
            power += linear(x).square().sum().item()
        assert error.normalized == pytest.approx(squared / power, rel=1e-5)
    assert len(errors["action.down"].by_step) == 4 and len(errors["language.q"].by_step) == 1


def test_representable_weights_have_no_error() -> None:
    bench = toy_bench()
    for linear in bench.policy.module.modules():
        if isinstance(linear, nn.Linear):
            codes = torch.randint(-7, 8, linear.weight.shape)
            codes[:, 0] = 7  # so that the peak's scale is the one that they were made with
            linear.weight.data = codes * 0.125
    errors = bench.output_errors(bench.quantize(rules_for_both(WEIGHTS_ONLY)))
    assert all(error.normalized < 1e-12 for error in errors.values())


def test_every_step_has_its_own_scale() -> None:
    """With a scale that rounds everything to zero in all steps but one, the whole output is lost there."""
    table = {"weight": {"bits": 8}, "activation": {"bits": 8, "granularity": "tensor", "mode": "per_step"}}
    chosen = recipe({"part": "language", "keep": "not asked for"}, {"part": "action", "quantize": table})
    bench = toy_bench()
    site = bench.quantize(chosen).sites[-1]
    scales = torch.full_like(site.tensors["step_scale"], 1e6)
    scales[2] = site.tensors["step_scale"][2]
    linear = bench.policy.module.get_submodule("action.down")
    linear.bias = None
    lost = replace(site, tensors={"step_scale": scales}, linears=(replace(site.linears[0], bias=None),))
    found = output_errors(bench.policy, [lost], bench.inputs)["action.down"].by_step
    assert found == pytest.approx([1, 1, 0, 1], abs=0.02)


def test_records_name_each_layer_once(bench: Workbench) -> None:
    records = layer_records(bench, bench.output_errors(bench.quantize(read_recipe("rtn"))))
    assert len({(r["part"], r["depth"], r["kind"]) for r in records}) == len(records) == 28
    assert all(r["nmse"] > 0 for r in records)


def test_a_policy_runs_quantized_only_while_open(bench: Workbench) -> None:
    before = answers(bench.policy, bench.held_out)
    with bench.running(None) as policy:
        np.testing.assert_array_equal(answers(policy, bench.held_out), before)
    with bench.running(read_recipe("rtn")) as policy:
        assert not np.array_equal(answers(policy, bench.held_out), before)
    np.testing.assert_array_equal(answers(bench.policy, bench.held_out), before)


def test_answers_are_in_order_whatever_the_batch(bench: Workbench) -> None:
    together = answers(bench.policy, bench.held_out)
    assert together.shape == (12, 4, 4) and together.dtype == np.float32
    last = bench.held_out[-1]
    alone = bench.policy.infer(last.observation, last.noise(bench.policy.noise_shape))
    np.testing.assert_allclose(together[-1:], alone, atol=1e-4)


def test_changed_floating_point_layers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, chosen = toy_bench(), rules_for_both(WEIGHTS_ONLY)
    changed = Quantized(build_plan(chosen, bench.policy), [], {"action.up.weight": torch.zeros(1)})
    monkeypatch.setattr(Workbench, "quantize", lambda self, recipe: changed)
    with pytest.raises(RecipeError, match=r"'test' changes action\.up\.weight"), bench.running(chosen):
        pass


def test_more_bits_err_less(bench: Workbench) -> None:
    rtn = read_recipe("rtn")
    four, eight = (
        bench.output_errors(bench.quantize(with_settings(rtn, [f"weight.bits={bits}", f"activation.bits={bits}"])))
        for bits in (4, 8)
    )
    assert all(eight[name].normalized < 0.1 * four[name].normalized for name in four)
