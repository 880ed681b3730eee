"""The command `omega-qvla`."""

import sys

from omega_qvla.cli import benchmarks, checkpoints, closed_loop, gate, hub, serving
from omega_qvla.cli.shared import ERR, app

app.add_typer(benchmarks.app, name="bench")

__all__ = ["app", "benchmarks", "checkpoints", "closed_loop", "gate", "hub", "main", "serving"]


def main() -> None:
    """Run the command; what the user can mend is one sentence and exit code 2."""
    try:
        app()
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        ERR.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
