"""The command as a user meets it: what it prints, and how it says no."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from omega_qvla import api, cli
from omega_qvla.cli import shared
from omega_qvla.quantization import driver
from omega_qvla.spec import recipe_names, scope_names

Quantized = Callable[[str], Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch, calibration: api.CalibrationSet) -> None:
    """Calibration without a simulator."""
    monkeypatch.setattr(api, "calibrate_on_rollouts", lambda *arguments, **options: calibration)


def assert_one_sentence(errors: str) -> None:
    sentence = errors.strip()
    assert sentence.startswith("error: ") and "\n" not in sentence and "Traceback" not in sentence


def report_of(run: Run, directory: Path) -> dict[str, Any]:
    code, output, _ = run("inspect", directory, "--json")
    assert code == 0
    return json.loads(output)


def test_recipes_are_listed() -> None:
    result = CliRunner().invoke(cli.app, ["recipes"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for name in recipe_names():
        assert name in result.output


def test_help_names_the_commands() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("quantize", "inspect", "evaluate", "recipes", "scopes", "demo", "reproduce", "bench"):
        assert command in result.output


@pytest.mark.usefixtures("calibrated")
@pytest.mark.parametrize("recipe", ["rtn", "omega-int4"])
def test_quantize_writes_what_the_library_writes(
    recipe: str, run: Run, checkpoint: Path, quantized: Quantized, tmp_path: Path
) -> None:
    code, output, _ = run("quantize", checkpoint, "--recipe", recipe, "--out", tmp_path / "out")
    assert code == 0 and recipe in output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for path in quantized(recipe).rglob("*"):
        if path.is_file():
            again = tmp_path / "out" / path.relative_to(quantized(recipe))
            assert again.read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("recipe", recipe_names())
def test_inspect_shows_every_linear(
    recipe: str, run: Run, quantized: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = report_of(run, quantized(recipe))
    monkeypatch.setattr(shared.OUT, "_width", 400)
    code, output, _ = run("inspect", quantized(recipe))
    assert code == 0
    rows = [line for line in output.splitlines() if "model." in line and "kept: " not in line]
    assert len(rows) == len(report["linears"]) == report["quantized_linears"] + report["kept_linears"]
    assert report["quantized_linears"] == sum(linear["quantized"] for linear in report["linears"])
    for linear in report["linears"]:
        row = next(row for row in rows if f" {linear['name']} " in row)
        bits = f"W{linear['weight_bits']:.3g}A{linear['activation_bits']}" if linear["quantized"] else "kept"
        assert linear["because"] in row and bits in row


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_bytes_add_up(recipe: str, run: Run, quantized: Quantized) -> None:
    report, directory = report_of(run, quantized(recipe)), quantized(recipe)
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert report["total_bytes"] == sum(path.stat().st_size for path in files)
    lines = ("codes", "scales", "rotation", "permutation", "factor", "step_table", "low_rank", "kept")
    tensors = sum(report[f"{line}_bytes"] for line in lines)
    weights = [path for path in files if path.suffix == ".safetensors" and path.parent == directory]
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in weights)
    assert tensors + headers == sum(path.stat().st_size for path in weights)
    quantized_linears = [linear for linear in report["linears"] if linear["quantized"]]
    with safe_open(directory / "quantized.safetensors", "pt") as file:
        for linear in quantized_linears:
            stored = [file.get_tensor(key) for key in file.keys() if key.rpartition(".")[0] == linear["name"]]  # noqa: SIM118
            assert linear["bytes"] == sum(tensor.nbytes for tensor in stored)


@pytest.mark.parametrize("recipe", recipe_names())
def test_codes_and_scales_are_about_a_quarter(recipe: str, run: Run, quantized: Quantized) -> None:
    """Four bits, and two bytes of scale for every 64 weights or more; also where the four bits are an average."""
    report = report_of(run, quantized(recipe))
    bits = [linear["weight_bits"] for linear in report["linears"] if linear["quantized"]]
    assert recipe == "qvla" or set(bits) == {4.0}
    assert 0.25 - 0.001 < report["codes_and_scales_share"] <= 0.275


def test_an_allocation_meets_its_budget_on_disk(run: Run, quantized: Quantized) -> None:
    """Codes of all widths together take what the budget allows, short of it by less than one demotion."""
    report = report_of(run, quantized("qvla"))
    weights = report["fp16_bytes"] // 2
    rows = sum(
        tensor.numel()
        for name, tensor in load_file(quantized("qvla") / "quantized.safetensors").items()
        if name.endswith(".widths")
    )
    codes = report["codes_bytes"] - rows
    assert weights * 4 / 8 - 1024 < codes <= weights * 4 / 8
    bits = {linear["weight_bits"] for linear in report["linears"] if linear["quantized"]}
    assert len(bits) > 3


@pytest.mark.usefixtures("calibrated")
def test_settings_and_scope(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("quantize", checkpoint, "--recipe", "rtn", "--set", "activation.bits=8", "--set", "weight.bits=3")
    code, output, _ = run(*arguments, "--scope", "language", "--out", tmp_path / "out")
    assert code == 0 and "rtn activation.bits=8 weight.bits=3 (language)" in output
    linears = [linear for linear in report_of(run, tmp_path / "out")["linears"] if linear["quantized"]]
    assert {linear["part"] for linear in linears} == {"language"}
    assert {(linear["weight_bits"], linear["activation_bits"]) for linear in linears} == {(3.0, 8)}


def test_settings_that_do_not_belong(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    for option in (("--set", "activation.bit=8"), ("--scope", "legs")):
        code, _, errors = run("quantize", checkpoint, "--recipe", "rtn", *option, "--out", tmp_path / "out")
        assert code == 2 and not (tmp_path / "out").exists()
        assert_one_sentence(errors)


def test_scopes_are_listed() -> None:
    result = CliRunner().invoke(cli.app, ["scopes"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and all(name in result.output for name in scope_names())


def test_what_is_executed_is_said(run: Run, quantized: Quantized) -> None:
    assert report_of(run, quantized("omega-int4"))["execution"] == "integer"
    report = report_of(run, quantized("omega-qvla"))
    assert report["execution"] == "simulated"
    assert {linear["execution"] for linear in report["linears"]} == {"integer", "simulated", "float"}
    assert "simulated" in run("inspect", quantized("omega-qvla"))[1]


@pytest.mark.usefixtures("calibrated")
def test_an_existing_destination_is_left_alone(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    code, _, errors = run("quantize", checkpoint, "--recipe", "rtn", "--out", tmp_path / "out")
    assert code == 2 and "already exists" in errors
    assert_one_sentence(errors)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious.txt"]


@pytest.mark.usefixtures("calibrated")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{checkpoint}", "--recipe", "nonsense"), "there is no recipe 'nonsense'; there are "),
        (("{checkpoint}", "--recipe", "nonsense.toml"), "there is no recipe file nonsense.toml"),
        (("{checkpoint}", "--dataset", "nowhere"), "nowhere holds no lerobot dataset"),
        (("nowhere",), "nowhere holds no lerobot checkpoint: config.json is missing"),
    ],
)
def test_quantize_says_what_is_missing(
    arguments: tuple[str, ...], message: str, run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    filled = [argument.format(checkpoint=checkpoint) for argument in arguments]
    code, _, errors = run("quantize", *filled, "--out", tmp_path / "out")
    assert code == 2 and message in errors
    assert_one_sentence(errors)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("calibrated")
def test_a_truncated_source_is_refused(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    code, _, errors = run("quantize", broken, "--out", tmp_path / "out")
    assert code == 2 and "model.safetensors is truncated" in errors
    assert_one_sentence(errors)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_corrupted_checkpoint_is_refused(run: Run, quantized: Quantized, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(quantized("rtn"), tmp_path / "broken"))
    content = bytearray((broken / "quantized.safetensors").read_bytes())
    content[-1] ^= 1
    (broken / "quantized.safetensors").write_bytes(content)
    code, output, errors = run("inspect", broken)
    assert code == 2 and "quantized.safetensors is damaged" in errors and not output
    assert_one_sentence(errors)


@pytest.mark.usefixtures("calibrated")
def test_a_destination_below_a_file_is_refused(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    code, _, errors = run("quantize", checkpoint, "--recipe", "rtn", "--out", out)
    assert code == 2
    assert_one_sentence(errors)


def test_unknown_options_are_refused(run: Run, tmp_path: Path) -> None:
    code, _, errors = run("quantize", tmp_path, "--out", tmp_path / "out", "--bits", "3")
    assert code == 2 and "--bits" in errors and "Traceback" not in errors


@pytest.mark.usefixtures("calibrated")
def test_an_interruption_leaves_finished_blocks_only(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        assert list(tmp_path.iterdir())  # the scratch directory is there
        raise KeyboardInterrupt

    monkeypatch.setattr("omega_qvla.pack.checkpoint.manifest_to_json", interrupt)
    code, _, errors = run("quantize", checkpoint, "--recipe", "rtn", "--out", tmp_path / "out")
    assert code not in (0, 2) and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]
    monkeypatch.undo()
    monkeypatch.setattr(driver, "quantize_site", None)  # every block is there already
    api.quantize(checkpoint, "rtn", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_as_a_new_process(quantized: Quantized, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from omega_qvla.cli import main; main()", "inspect"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert_one_sentence(done.stderr)
    done = subprocess.run([*command, str(quantized("rtn")), "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["recipe"] == "rtn"


@pytest.mark.parametrize(("scope", "parts"), [("policy", {"language", "action"}), ("with-vision", None)])
def test_inspect_says_what_a_recipe_would_do(run: Run, checkpoint: Path, scope: str, parts: set[str] | None) -> None:
    code, output, _ = run("inspect", checkpoint, "--scope", scope, "--json")
    report = json.loads(output)
    assert code == 0 and set(report["parts"]) == (parts or {"vision", "language", "action"})
    for part, found in report["parts"].items():
        members = [each for each in report["linears"] if each["site"] and each["part"] == part]
        assert found["linears"] == len(members)
        assert found["weights"] == sum(each["in_features"] * each["out_features"] for each in members)
    code, output, _ = run("inspect", checkpoint, "--recipe", "gptq", "--scope", scope)
    assert code == 0 and "gptq" in output and "would quantize: " in output


def test_inspect_refuses_what_does_not_apply(run: Run, checkpoint: Path, quantized: Quantized) -> None:
    code, _, errors = run("inspect", quantized("omega-int4"), "--recipe", "gptq")
    assert code == 2 and "is quantized already, its recipe is in it" in errors
    code, _, errors = run("inspect", checkpoint, "--resident")
    assert code == 2 and "is no quantized checkpoint" in errors


def test_inspect_measures_the_resident_memory(run: Run, quantized: Quantized) -> None:
    code, output, _ = run("inspect", quantized("omega-int4"), "--resident", "--json")
    report = json.loads(output)
    assert code == 0 and report["parts"].keys() == {"language", "action"}
    assert sum(part["linears"] for part in report["parts"].values()) == report["quantized_linears"]
    assert report["resident"]["anonymous"] + report["resident"]["file_backed"] > 0


@pytest.mark.parametrize(
    ("size", "expected"), [("8GiB", 2**33), ("1.5 GB", 1_500_000_000), ("512", 512), ("300MiB", 300 * 2**20)]
)
def test_sizes(size: str, expected: int) -> None:
    assert shared.size_in_bytes(size) == expected


def test_what_is_no_size_is_refused(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    code, _, errors = run("quantize", checkpoint, "--out", tmp_path / "out", "--memory-budget", "plenty")
    assert code == 2 and "'plenty' is no size; write for example 8GiB" in errors


@pytest.mark.usefixtures("calibrated")
def test_a_budget_prints_what_is_needed_first(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    code, _, errors = run("quantize", checkpoint, "--out", tmp_path / "out", "--memory-budget", "64GiB")
    assert code == 0 and re.search(r"needs \d+\.\d GiB of memory \(process .*\) and .* of disk; about", errors)
    code, _, errors = run("quantize", checkpoint, "--out", tmp_path / "small", "--memory-budget", "1MiB")
    assert code == 2 and "the budget is 0.0 GiB; raise --memory-budget" in errors
    assert not (tmp_path / "small").exists()


def test_bench_policies(run: Run, checkpoint: Path, quantized: Quantized, tmp_path: Path) -> None:
    out = tmp_path / "bench"
    directories = checkpoint, quantized("omega-int4")
    code, output, _ = run("bench", "policies", *directories, "--out", out, "--threads", "1", "--rounds", "1")
    assert code == 0 and "omega-int4 (integer)" in output
    assert {path.name for path in out.iterdir()} == {"policies.md", "policies.svg", "policies.json"}


def test_bench_says_no(run: Run, tmp_path: Path) -> None:
    for arguments, sentence in (
        (("layers", "--policy", "gpt"), "there are no layers of 'gpt '; there are those of groot_n15 action, "),
        (("layers", "--threads", "two"), "'two' are no numbers of threads"),
        (("policies", tmp_path, "--onnx-runtime", "head"), "'head' is no part; there are vision, language, action"),
    ):
        code, _, errors = run("bench", *arguments, "--out", tmp_path / "bench")
        assert code == 2 and sentence in errors
        assert_one_sentence(errors)
