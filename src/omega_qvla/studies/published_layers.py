"""Figures of single layers that were published, kept apart from everything measured."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from omega_qvla.studies.published import PublishedTable

ROTATIONS = ("none", "svd", "svd_hadamard")
"""What the three values of a layer are of."""


@dataclass(frozen=True)
class RotatedLayer:
    """One layer under each of ROTATIONS; see `published_layers.toml`."""

    layer: str
    """Part, depth and kind, such as `language 2 q_proj`."""
    channel_ratio: float
    nmse: tuple[float, ...]
    row_max: tuple[float, ...] = ()


@dataclass(frozen=True)
class PublishedLayers:
    """The layers of one released policy."""

    policy: str
    source: str
    layers: tuple[RotatedLayer, ...]

    def table(self) -> PublishedTable:
        """Every layer with the errors under no rotation, SVD and SVD·H, then the row maxima."""
        columns = ("layer", "channel max / median", *(f"{what}, {r}" for what in ("nMSE", "row max") for r in _SHORT))
        rows: tuple[tuple[str | float, ...], ...] = tuple(
            (layer.layer, layer.channel_ratio, *layer.nmse, *layer.row_max) for layer in self.layers
        )
        return PublishedTable(self.source, f"rotations on {self.policy} at W4A4", columns, rows)


_SHORT = ("none", "SVD", "SVD·H")


@cache
def published_layers() -> tuple[PublishedLayers, ...]:
    """All tables of `published_layers.toml`."""
    text = (resources.files("omega_qvla.studies") / "published_layers.toml").read_text(encoding="utf-8")
    return tuple(
        PublishedLayers(
            table["policy"],
            table["source"],
            tuple(
                RotatedLayer(row["layer"], row["channel_ratio"], tuple(row["nmse"]), tuple(row["row_max"]))
                for row in table["layers"]
            ),
        )
        for table in tomllib.loads(text)["tables"]
    )
