"""The ablation's variants on synthetic layers that have the outlier ratios published for pi0.5 and GR00T N1.5.

    python benchmarks/synthetic_layers.py --out docs/results

A layer is 1024 -> 1024 with Gaussian weights of uneven column energy. Its inputs are heavy-tailed tokens whose
channels have lognormal sizes, 12 of them raised until channel max / median of the peaks is as published; inputs
of the action side shrink by 18 % over the denoising steps. Errors are normalized output errors on held-out
tokens. Writes `synthetic_layers.json` and `synthetic_layers.md`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from ablation import variants
from torch import Tensor, nn

from omega_qvla.calibration import Needs, SiteStatistics
from omega_qvla.evaluation.results import write_text
from omega_qvla.pack.manifest import PlannedSite
from omega_qvla.quantization.driver import quantize_site
from omega_qvla.runtime import DenoisingStep, QuantizedInput, QuantizedLinear
from omega_qvla.spec import Part, Recipe

WIDTH, TOKENS, STEPS, OUTLIERS, DRIFT = 1024, 256, 10, 12, 0.18
# Channel max / median of the published inputs: pi0.5 (layers 2, 8, 14) and GR00T N1.5.
LAYERS: dict[str, tuple[Part, float]] = {
    "language q_proj, 12x": ("language", 12.4),
    "language gate_proj, 65x": ("language", 65.0),
    "language down_proj, 206x": ("language", 206.0),
    "language down_proj, 57,900x": ("language", 57_899.0),
    "action q_proj, 14x": ("action", 14.0),
    "action down_proj, 80x": ("action", 80.0),
}


def inputs(ratio: float, steps: int, generator: torch.Generator) -> dict[int | None, Tensor]:
    """Tokens [TOKENS, WIDTH] by step; one step None for inputs without steps."""
    size = torch.exp(0.5 * torch.randn(WIDTH, generator=generator))
    size[torch.randperm(WIDTH, generator=generator)[:OUTLIERS]] = size.median() * ratio
    found: dict[int | None, Tensor] = {}
    for step in range(steps):
        tokens = torch.randn(2 * TOKENS, WIDTH, generator=generator)
        tokens *= torch.exp(0.3 * torch.randn(2 * TOKENS, 1, generator=generator))
        found[step if steps > 1 else None] = tokens * size * (1 - DRIFT * step / max(1, steps - 1))
    return found


def layer_error(recipe: Recipe, part: Part, ratio: float, seed: int) -> float:
    """Normalized output error of one layer under the recipe's rule for its part."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    energy = torch.exp(0.3 * torch.randn(WIDTH, generator=generator))
    linear.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 * energy)
    tokens = inputs(ratio, STEPS if part == "action" else 1, generator)
    spec = next(rule.quantize for rule in recipe.rules if rule.part == part)
    assert spec is not None
    statistics = SiteStatistics("layer", Needs(spec.needs_hessian, spec.needs_samples))
    for step, x in tokens.items():
        statistics.add(x[:TOKENS], step, generator)
    module = nn.ModuleDict({"layer": linear})
    site = PlannedSite("layer", part, "block", WIDTH, ("layer",), 0)
    packed = quantize_site(site, spec, SimpleNamespace(module=module, denoising_steps=STEPS), statistics)
    step_context = DenoisingStep(STEPS)
    quantized = QuantizedLinear(packed.linears[0], packed, QuantizedInput(packed, step_context), "simulated")
    error = power = 0.0
    for step, x in tokens.items():
        wanted = x[TOKENS:] @ linear.weight.t()
        with step_context.at(step or 0):
            error += (quantized(x[TOKENS:]) - wanted).square().sum().item()
        power += wanted.square().sum().item()
    return error / power


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    results: dict[str, dict[str, list[float]]] = {}
    for recipe in variants():
        results[recipe.name] = {
            name: [layer_error(recipe, part, ratio, seed) for seed in range(options.seeds)]
            for name, (part, ratio) in LAYERS.items()
        }
        print(
            recipe.name,
            {name: f"{errors[0]:.4f}" for name, errors in results[recipe.name].items()},
            flush=True,
        )
    lines = ["| variant | " + " | ".join(LAYERS) + " |", "|---|" + "---|" * len(LAYERS)]
    for name, errors in results.items():
        cells = (f"{sum(found) / len(found):.4f}" for found in errors.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    write_text(options.out / "synthetic_layers.json", json.dumps(results, indent=1) + "\n")
    write_text(options.out / "synthetic_layers.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
