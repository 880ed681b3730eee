"""The checkpoint on disk: what is written is read again, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omega_qvla.pack import checkpoint as checkpoint_module
from omega_qvla.pack.checkpoint import (
    KEPT_FILE,
    MANIFEST_FILE,
    QUANTIZED_FILE,
    is_checkpoint,
    read,
    read_manifest,
    save,
    sha256,
    verify,
    written_beside,
)
from omega_qvla.pack.inspect import inspect
from omega_qvla.pack.manifest import (
    FORMAT_VERSION,
    CheckpointError,
    Manifest,
    Source,
    manifest_from_json,
    manifest_to_json,
)
from omega_qvla.pack.site import tensors_of
from omega_qvla.pack.stream import Tensors, sources_in
from omega_qvla.quantization import Quantized, quantize_policy
from toy_policy import ToyPolicy, rules_for_both, toy_observations

TABLE: dict[str, Any] = {
    "transform": {
        "smoothing": 0.5,
        "permutation": "zigzag",
        "rotation": "svd",
        "block_size": 8,
        "folded_percentile": 99.0,
    },
    "activation": {"granularity": "channel", "mode": "static"},
    "weight": {"group_size": 8},
}


@pytest.fixture(scope="module")
def result() -> Quantized:
    return quantize_policy(ToyPolicy(), rules_for_both(TABLE), toy_observations(8))


def manifest_of(result: Quantized) -> Manifest:
    return Manifest("toy", 4, result.plan, Source("toy", {}), None, {})


def kept_tensors() -> dict[str, Tensor]:
    return {name: x for name, x in ToyPolicy().stored_tensors().items() if name.startswith("head.")}


def write(result: Quantized, out: Path, kept: Tensors | None = None) -> Path:
    support = out.parent / "config.json"
    support.write_text('{"type": "toy"}')
    kept = kept_tensors() if kept is None else kept
    save(out, manifest_of(result), result.sites, kept, {"config.json": support})
    return out


@pytest.fixture(scope="module")
def original(result: Quantized, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(result, tmp_path_factory.mktemp("original") / "toy")


@pytest.fixture
def copied(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def rehash(directory: Path) -> Path:
    """Make the manifest consistent with whatever the files now are."""
    document = json.loads((directory / MANIFEST_FILE).read_text())
    for name in document["files"]:
        path = directory / name
        document["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (directory / MANIFEST_FILE).write_text(json.dumps(document))
    return directory


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((directory / MANIFEST_FILE).read_text())
    change(document)
    (directory / MANIFEST_FILE).write_text(json.dumps(document))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / QUANTIZED_FILE)
    change(tensors)
    save_file(tensors, directory / QUANTIZED_FILE)
    rehash(directory)


def assert_refused(directory: Path, message: str) -> None:
    """By everything that opens a checkpoint, with one sentence."""
    for open_checkpoint in (verify, read, inspect):
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(directory)
        assert "\n" not in str(caught.value).strip()


def test_round_trip(result: Quantized, original: Path) -> None:
    found = read(original)
    assert replace(found.manifest, files={}) == manifest_of(result)
    assert verify(original) == read_manifest(original) == found.manifest
    assert [site.name for site in found.sites] == [site.name for site in result.sites]
    for site, expected in zip(found.sites, result.sites, strict=True):
        assert replace(site, linears=(), tensors={}) == replace(expected, linears=(), tensors={})
        assert site.tensors.keys() == expected.tensors.keys()
        pairs = [(site.tensors[key], expected.tensors[key]) for key in site.tensors]
        for a, b in zip(site.linears, expected.linears, strict=True):
            assert a.name == b.name and a.bias is not None and b.bias is not None
            pairs += [(a.packed, b.packed), (a.scale, b.scale), (a.bias, b.bias)]
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    assert found.kept.keys() == kept_tensors().keys()
    assert all(torch.equal(found.kept[name], tensor) for name, tensor in kept_tensors().items())
    assert json.loads((found.policy_directory / "config.json").read_text()) == {"type": "toy"}


def test_the_same_input_gives_the_same_bytes(result: Quantized, original: Path, tmp_path: Path) -> None:
    again = write(result, tmp_path / "again")
    names = sorted(str(path.relative_to(original)) for path in original.rglob("*") if path.is_file())
    assert names == [KEPT_FILE, MANIFEST_FILE, "policy/config.json", QUANTIZED_FILE]
    assert all((again / name).read_bytes() == (original / name).read_bytes() for name in names)


@pytest.mark.parametrize("of_the_plan", ["language.q.weight_packed", "action.input.smoothing"])
def test_sites_that_are_not_what_was_planned_are_not_written(
    of_the_plan: str, result: Quantized, tmp_path: Path
) -> None:
    owner, tensor = of_the_plan.rsplit(".", 1)
    sites = [
        replace(
            site,
            linears=tuple(linear for linear in site.linears if linear.name != owner),
            tensors={key: value for key, value in site.tensors.items() if (site.name, key) != (owner, tensor)},
        )
        for site in result.sites
    ]
    with pytest.raises(CheckpointError, match=rf"{QUANTIZED_FILE} lacks {of_the_plan}"):
        write(replace(result, sites=sites), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_kept_tensors_that_are_read_when_written_give_the_same_bytes(
    result: Quantized, original: Path, tmp_path: Path
) -> None:
    save_file(kept_tensors(), tmp_path / "kept.safetensors")
    out = write(result, tmp_path / "out", sources_in(tmp_path / "kept.safetensors"))
    assert (out / KEPT_FILE).read_bytes() == (original / KEPT_FILE).read_bytes()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are listed on Linux only")
def test_tensors_stay_in_their_files(copied: Path) -> None:
    found = read(copied)
    stored = tensors_of(found.sites)
    for name, tensors in {KEPT_FILE: found.kept, QUANTIZED_FILE: stored}.items():
        before = (copied / name).read_bytes()
        for tensor in tensors.values():
            assert mapped_file(tensor) == str(copied / name)
            tensor.zero_()
        assert (copied / name).read_bytes() == before


def mapped_file(tensor: Tensor) -> str:
    """The file to which a tensor's memory belongs; empty if it belongs to none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        if start <= tensor.data_ptr() < end:
            return path
    return ""


def test_its_bytes_are_accounted_for(original: Path) -> None:
    report = inspect(original)
    tensors = load_file(original / QUANTIZED_FILE)
    biases = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith(".bias"))
    assert report.quantized_bytes == sum(tensor.nbytes for tensor in tensors.values()) - biases
    assert report.quantized_bytes == sum(
        (
            report.codes_bytes,
            report.scales_bytes,
            report.rotation_bytes,
            report.permutation_bytes,
            report.factor_bytes,
            report.step_table_bytes,
            report.low_rank_bytes,
        )
    )
    assert report.quantized_share == report.quantized_bytes / report.fp16_bytes > report.codes_and_scales_share
    assert report.kept_bytes == biases + sum(tensor.nbytes for tensor in kept_tensors().values())
    assert sum(report.kept_by_module.values()) == report.kept_bytes
    assert report.kept_by_module == {
        "head": 4 * (2 * 16 + 2),
        "action.up": 4 * 32,
        "language.q": 4 * 16,
        "action.down": 4 * 16,
        "language.k": 4 * 8,
    }
    assert list(report.kept_by_module.values()) == sorted(report.kept_by_module.values(), reverse=True)


def test_stacks_of_layers_are_accounted_for_together(result: Quantized, tmp_path: Path) -> None:
    names = ("tower.layers.0.norm.weight", "tower.layers.1.norm.weight", "tower.embed.weight", "noise", "list.0")
    kept = {name: torch.zeros(4) for name in names}
    by_module = inspect(write(result, tmp_path / "out", kept)).kept_by_module
    found = {module: by_module.get(module) for module in ("tower.layers", "tower.embed", "noise", "list")}
    assert found == {"tower.layers": 32, "tower.embed": 16, "noise": 16, "list": 16}


def test_it_can_be_moved(copied: Path, original: Path) -> None:
    assert read(copied).manifest == read(original).manifest


def test_what_is_a_checkpoint(original: Path, tmp_path: Path) -> None:
    assert is_checkpoint(original) and not is_checkpoint(tmp_path)
    assert_refused(tmp_path, r"holds no quantized checkpoint: manifest\.json is missing")


@pytest.mark.parametrize("name", [QUANTIZED_FILE, KEPT_FILE, "policy/config.json"])
def test_a_missing_file(name: str, copied: Path) -> None:
    (copied / name).unlink()
    assert_refused(copied, rf"{name} is missing")


@pytest.mark.parametrize("name", [QUANTIZED_FILE, KEPT_FILE, "policy/config.json"])
@pytest.mark.parametrize("kept_bytes", [0, 5, -1])
def test_a_truncated_file(name: str, kept_bytes: int, copied: Path) -> None:
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[:kept_bytes])
    assert_refused(copied, rf"{name} has \d+ bytes instead of {len(content)}: it is truncated or foreign")


@pytest.mark.parametrize("name", [QUANTIZED_FILE, KEPT_FILE, "policy/config.json"])
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_one_flipped_bit(name: str, place: float, copied: Path) -> None:
    content = bytearray((copied / name).read_bytes())
    content[round(place * (len(content) - 1))] ^= 4
    (copied / name).write_bytes(content)
    assert_refused(copied, rf"{name} is damaged: its content does not match the manifest's hash")


@pytest.mark.parametrize("name", ["extra.bin", "policy/tokenizer/more.json"])
def test_a_foreign_file(name: str, copied: Path) -> None:
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_text("{}")
    assert_refused(copied, rf"{name} does not belong to the checkpoint")


def test_a_file_that_is_no_safetensors(copied: Path) -> None:
    (copied / QUANTIZED_FILE).write_bytes(b"not tensors at all")
    assert_refused(rehash(copied), rf"{QUANTIZED_FILE} is no safetensors file")


def test_kept_tensors_that_are_no_safetensors(copied: Path) -> None:
    (copied / KEPT_FILE).write_bytes(b"not tensors at all")
    assert_refused(rehash(copied), rf"{KEPT_FILE} is no safetensors file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"manifest\.json is not JSON"),
        ("{", r"manifest\.json is not JSON"),
        ("\xff\xfe", r"manifest\.json is not"),
        ("[]", r"manifest\.json is not of a checkpoint that this program wrote"),
        ('{"format": "gguf"}', r"manifest\.json is not of a checkpoint that this program wrote"),
        ('{"format": "omega-qvla"}', r"has format version None, this program reads 1"),
    ],
)
def test_a_foreign_manifest(text: str, message: str, copied: Path) -> None:
    (copied / MANIFEST_FILE).write_bytes(text.encode("latin-1"))
    assert_refused(copied, message)


def test_a_manifest_of_another_version(copied: Path) -> None:
    edit_manifest(copied, lambda document: document.update(format_version=FORMAT_VERSION + 1))
    assert_refused(copied, f"the checkpoint has format version {FORMAT_VERSION + 1}, this program reads 1 and 2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("plan"), r"manifest\.json: plan: "),
        (lambda d: d.update(surprise=1), r"manifest\.json: surprise: "),
        (lambda d: d["plan"]["sites"][0].update(in_features="many"), r"plan\.sites\.0\.in_features: "),
        (lambda d: d["plan"]["linears"][0].update(kept_because="both"), r"quantized in a site or kept"),
        (lambda d: d["plan"]["sites"][0].update(rule=9), r"language\.input refers to rule 9"),
        (lambda d: d["plan"]["sites"][0].update(linears=["language.z"]), r"language\.z"),
        (lambda d: d["files"].pop(QUANTIZED_FILE), rf"does not list {QUANTIZED_FILE}"),
        (lambda d: d["files"].pop(KEPT_FILE), rf"does not list {KEPT_FILE}"),
        (lambda d: d["files"].pop("policy/config.json"), r"policy/config\.json does not belong"),
    ],
)
def test_a_manifest_that_contradicts_itself(
    change: Callable[[dict[str, Any]], None], message: str, copied: Path
) -> None:
    edit_manifest(copied, change)
    assert_refused(copied, message)


PACKED = "language.q.weight_packed"


def pop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pop(PACKED), rf"{QUANTIZED_FILE} lacks {PACKED}"),
        (pop("language.input.permutation"), r"lacks language\.input\.permutation"),
        (pop("action.hidden.step_scale"), r"lacks action\.hidden\.step_scale"),
        (put("language.q.extra", torch.zeros(1)), r"holds language\.q\.extra, which the plan does not know"),
        (put("head.weight_scale", torch.zeros(1)), r"holds head\.weight_scale, which the plan does not know"),
        (
            put(PACKED, torch.zeros(16, 7, dtype=torch.uint8)),
            rf"{PACKED} is torch\.uint8 \[16, 7\] instead of torch\.uint8 \[16, 8\]",
        ),
        (put(PACKED, torch.zeros(16, 8, dtype=torch.int32)), rf"{PACKED} is torch\.int32 .*torch\.uint8"),
        (
            put(PACKED, torch.zeros(16, 8, dtype=torch.int8)),
            rf"{PACKED} is \S+ \[16, 8\] instead of torch\.uint8",
        ),
        (
            put("language.q.weight_scale", torch.zeros(16, 2)),
            r"weight_scale is torch\.float32 .*torch\.bfloat16",
        ),
        (
            put("language.k.weight_scale", torch.zeros(8, 1, dtype=torch.bfloat16)),
            r"language\.k\.weight_scale is torch\.bfloat16 \[8, 1\] instead of torch\.bfloat16 \[8, 2\]",
        ),
        (put("action.input.smoothing", torch.ones(15)), r"action\.input\.smoothing is torch\.float32 \[15\]"),
        (
            put("action.input.rotation", torch.zeros(1, 16, 16, dtype=torch.bfloat16)),
            r"action\.input\.rotation is torch\.bfloat16 \[1, 16, 16\] instead of .* \[2, 8, 8\]",
        ),
        (put("language.q.bias", torch.ones(3)), r"language\.q\.bias has shape \[3\] instead of \[16\]"),
    ],
)
def test_tensors_that_are_not_what_the_plan_says(
    change: Callable[[dict[str, Tensor]], None], message: str, copied: Path
) -> None:
    edit_tensors(copied, change)
    assert_refused(copied, message)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_kept_tensors_that_are_not_finite_are_not_written(bad: float, result: Quantized, tmp_path: Path) -> None:
    kept = kept_tensors() | {"head.weight": torch.tensor([[1.0, bad]])}
    with pytest.raises(CheckpointError, match=r"head\.weight contains NaN or infinity"):
        write(result, tmp_path / "out", kept)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_an_existing_destination_is_refused_and_untouched(result: Quantized, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="out already exists; choose another directory or remove it"):
        write(result, out)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "out"]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["write_tensors", "manifest_to_json"])
def test_a_failure_leaves_nothing(
    moment: str, error: BaseException, result: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        assert len(list(tmp_path.iterdir())) == 2  # the scratch directory is there
        raise error

    monkeypatch.setattr(checkpoint_module, moment, fail)
    with pytest.raises(type(error)):
        write(result, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_nothing_is_seen_before_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with written_beside(out) as scratch:
        assert not out.exists() and scratch.parent == out.parent
        (scratch / "file").write_text("x")
    assert (out / "file").read_text() == "x" and not scratch.exists()
    assert out.stat().st_mode & 0o777 == 0o755


def test_manifest_round_trip(result: Quantized) -> None:
    manifest = manifest_of(result)
    assert manifest_from_json(manifest_to_json(manifest)) == manifest
