"""Commands that say how fast it is: bench layers, bench policies."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, get_args

import typer

from omega_qvla import api
from omega_qvla.cli.shared import OUT, progress
from omega_qvla.spec import Part

app = typer.Typer(help="Measure how fast quantized linears and policies are.", no_args_is_help=True)


@app.command("layers")
def bench_layers(
    out: Annotated[Path, typer.Option(help="Directory to write layers.md, layers.svg and layers.json to.")],
    policy: Annotated[str, typer.Option(help="pi05 or groot_n15; both if empty.")] = "",
    part: Annotated[str, typer.Option(help="language or action; both if empty.")] = "",
    threads: Annotated[str, typer.Option(help="Numbers of threads, separated by commas.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each library, of about 30 ms.")] = 15,
) -> None:
    """Time the linears of released policies against torch, ONNX Runtime, OpenVINO and oneDNN, in turn.

    Rotation and rounding of the input are part of the time. What does not compute what it should is not timed.
    """
    from omega_qvla.bench.layers import SiteResult, contenders, measure_layers
    from omega_qvla.bench.report import layers_table, write_layers
    from omega_qvla.bench.sites import SITES

    sites = [site for site in SITES if policy in ("", site.policy) and part in ("", site.part)]
    if not sites:
        names = sorted({f"{site.policy} {site.part}" for site in SITES})
        raise ValueError(f"there are no layers of '{policy} {part}'; there are those of {', '.join(names)}")
    compared = contenders()
    counts = _numbers(threads)
    versions = {each.library: each.version for each in compared}
    results: list[SiteResult] = []
    with progress() as on_progress:

        def measured(result: SiteResult) -> None:
            results.append(result)
            write_layers(out, results, versions, rounds)  # what there is, should the rest be interrupted
            on_progress(result.site.label, len(results) / (len(sites) * len(counts)))

        measure_layers(sites, compared, counts, rounds, on_site=measured)
    for count in counts:
        OUT.print(f"{count} threads, ratios of medians:", highlight=False)
        OUT.print(layers_table([result for result in results if result.threads == count]), soft_wrap=True)


@app.command("policies")
def bench_policies(
    directories: Annotated[list[Path], typer.Argument(help="Policies, quantized or not; the first is the baseline.")],
    out: Annotated[Path, typer.Option(help="Directory to write policies.md, policies.svg and policies.json to.")],
    threads: Annotated[str, typer.Option(help="Numbers of threads, separated by commas.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Inferences of each policy, one per round.")] = 20,
    onnx_runtime: Annotated[
        str,
        typer.Option(help="Also the first policy, products of these parts by ONNX Runtime, such as language,action."),
    ] = "",
) -> None:
    """Time whole policies on a random observation, in turn: a chunk of actions, and each of its stages."""
    from omega_qvla.bench.contenders import OnnxFloat, TorchFloat
    from omega_qvla.bench.policies import Entry, measure_policies
    from omega_qvla.bench.report import policies_table, write_policies

    counts = _numbers(threads)
    entries = [Entry(*named) for named in zip(api.labels(directories), directories, strict=True)]
    libraries = [TorchFloat.library]
    if onnx_runtime:
        parts = _parts(onnx_runtime)
        entries.insert(1, Entry(f"{entries[0].label}, ONNX Runtime in {onnx_runtime}", directories[0], parts))
        libraries.append(OnnxFloat.library)
    with progress() as on_progress:
        found = measure_policies(
            entries,
            counts,
            rounds=rounds,
            on_round=lambda done, of: on_progress("inferring", done / of),
        )
    write_policies(out, found, {name: version(name) for name in libraries}, rounds)
    for count in counts:
        OUT.print(f"{count} threads:", highlight=False)
        OUT.print(policies_table([each for each in found if each.threads == count]), soft_wrap=True)


def _parts(text: str) -> tuple[Part, ...]:
    """Parts of a policy, separated by commas. Raises `ValueError` for anything else."""
    names: tuple[Part, ...] = get_args(Part)
    found = tuple(name for name in names if name in text.split(","))
    if unknown := set(text.split(",")) - set(found):
        raise ValueError(f"{min(unknown)!r} is no part; there are {', '.join(names)}")
    return found


def _numbers(text: str) -> list[int]:
    """Positive whole numbers, separated by commas. Raises `ValueError` for anything else."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ValueError(f"{text!r} are no numbers of threads; write them as 1,2")
    return [int(number) for number in text.split(",")]
