"""Commands that publish checkpoints and fetch them: card, push, pull."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omega_qvla.cli.shared import OUT, app
from omega_qvla.pack.checkpoint import verify
from omega_qvla.pack.manifest import CARD_FILE

if TYPE_CHECKING:
    from omega_qvla.evaluation.results import Evaluation

Checkpoint = Annotated[Path, typer.Argument(help="A quantized checkpoint.")]
EvidenceOption = Annotated[
    Path | None,
    typer.Option("--evidence", help="What `evaluate --json` wrote about it; without it the card says there is none."),
]
BaseModelOption = Annotated[
    str, typer.Option("--base-model", help="Where the floating-point policy is published, such as ORG/NAME.")
]
BaseRevisionOption = Annotated[
    str, typer.Option("--base-revision", help="The commit, tag or branch of it that was quantized.")
]
LicenseOption = Annotated[str, typer.Option("--license", help="The Hub's word for its license, such as apache-2.0.")]


@app.command()
def card(
    directory: Checkpoint,
    evidence: EvidenceOption = None,
    base_model: BaseModelOption = "",
    base_revision: BaseRevisionOption = "",
    license_name: LicenseOption = "",
    write: Annotated[
        bool, typer.Option("--write", help="Put it into the checkpoint instead of printing it.")
    ] = False,
) -> None:
    """Print a checkpoint's model card, or write it. Nothing is sent and nothing is fetched."""
    from omega_qvla.hub import Origin, model_card, write_card

    origin = Origin(base_model or None, base_revision or None, license_name or None)
    text = model_card(directory, origin, _read(evidence))
    if write:
        OUT.print(f"{write_card(directory, text)} is written")
    else:
        print(text)


@app.command()
def push(
    directory: Checkpoint,
    repository: Annotated[str, typer.Argument(help="On the Hub, such as ORG/NAME; made if there is none.")],
    private: Annotated[bool | None, typer.Option(help="Who may see a new repository.")] = None,
    revision: Annotated[str, typer.Option(help="A branch, made if there is none.")] = "",
    evidence: EvidenceOption = None,
    base_model: BaseModelOption = "",
    base_revision: BaseRevisionOption = "",
    license_name: LicenseOption = "",
) -> None:
    """Verify a checkpoint and send it to the Hugging Face Hub with its model card.

    A card that was written into the checkpoint is sent as it is; otherwise one is made. With --base-model, the
    weights there are compared with those that were quantized, and their commit goes into the card.
    """
    from omega_qvla import hub

    manifest = verify(directory)
    written = directory / CARD_FILE
    if written.is_file():
        if evidence or base_model or base_revision or license_name:
            raise ValueError(
                f"{written} is there and would be sent as it is: leave out what is for a new card, or renew it first "
                "with `card --write`"
            )
        text = written.read_text(encoding="utf-8")
    else:
        commit = hub.check_base(manifest, base_model, base_revision or None) if base_model else None
        origin = hub.Origin(base_model or None, commit, license_name or None)
        text = hub.model_card(directory, origin, _read(evidence))
    address = hub.push(directory, repository, text, private=private, revision=revision or None)
    OUT.print(f"{directory} is at {address}", soft_wrap=True)


@app.command()
def pull(
    repository: Annotated[str, typer.Argument(help="On the Hub, such as ORG/NAME.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    revision: Annotated[str, typer.Option(help="A branch, tag or commit; the main branch if empty.")] = "",
) -> None:
    """Fetch a quantized checkpoint from the Hugging Face Hub and verify it.

    It appears only when all of it is as its manifest says. What is fetched stays beside it until then, so that the
    same command goes on after an interruption.
    """
    from omega_qvla import hub

    manifest = hub.pull(repository, out, revision=revision or None)
    OUT.print(f"{out}: recipe {manifest.plan.recipe.name}, source {manifest.source.directory}", soft_wrap=True)


def _read(path: Path | None) -> Evaluation | None:
    """An evaluation file. Raises `ValueError` or `OSError` if it is none."""
    if path is None:
        return None
    from omega_qvla.evaluation.results import load

    return load(path)
