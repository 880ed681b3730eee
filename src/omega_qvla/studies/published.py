"""What the papers print, kept apart from everything measured."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from omega_qvla.studies.rendering import markdown_table


@dataclass(frozen=True)
class PublishedTable:
    """A table of a paper, or the averages of one."""

    source: str
    """The paper and the number of the table."""
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """The table under a line that says where it is from."""
        cells = [[str(value) for value in row] for row in self.rows]
        note = f"\n{self.note}\n" if self.note else ""
        return f"Published ({self.source}): {self.title}.\n\n{markdown_table(self.columns, cells)}{note}"


@cache
def published_tables() -> dict[str, PublishedTable]:
    """The tables of `published.toml` by their key, such as `omega-qvla-table-1`."""
    text = (resources.files("omega_qvla.studies") / "published.toml").read_text(encoding="utf-8")
    return {key: _table(**fields) for key, fields in tomllib.loads(text).items()}


def published_section(*keys: str) -> str:
    """The named tables as a section of a study's Markdown."""
    tables = "\n".join(published_tables()[key].markdown() for key in keys)
    return f"## Published, not measured here\n\nOther policies, tasks and machines.\n\n{tables}"


def _table(
    source: str, title: str, columns: list[str], rows: list[list[str | float]], note: str = ""
) -> PublishedTable:
    return PublishedTable(source, title, tuple(columns), tuple(map(tuple, rows)), note)
