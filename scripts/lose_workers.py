"""An evaluation on a Ray cluster that loses two workers on the way, against the same evaluation in one process.

The result files have to be equal but for the time at which they were made and the milliseconds in them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from omega_qvla import api
from omega_qvla.spec import read_recipe

TASKS = "drawer-open-v3,push-v3"
KILL_AFTER = (1, 3)
"""Finished blocks after which a worker is killed."""
INTO_THE_BLOCK = 3.0
"""Seconds."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, required=True, help="directory to write")
    arguments.add_argument("--episodes", type=int, default=24, help="per task")
    options = arguments.parse_args()
    source, quantized = api.bundled_checkpoint(), options.out / "omega-int4"
    if not quantized.exists():
        api.quantize(source, read_recipe("omega-int4"), quantized)
    program = Path(sys.executable).with_name("omega-qvla")
    command = [str(program), "evaluate", str(source), str(quantized), "--tasks", TASKS]
    command += ["--episodes", str(options.episodes)]
    here, cluster = options.out / "here.json", options.out / "cluster.json"
    subprocess.run([*command, "--workers", "1", "--json", str(here)], check=True)
    killed = run_and_kill([*command, "--ray", "local", "--workers", "2", "--json", str(cluster)])
    equal = without_times(here) == without_times(cluster)
    print(f"killed processes {killed}; the files are {'equal' if equal else 'DIFFERENT'} but for times")
    sys.exit(0 if equal and len(set(killed)) == len(KILL_AFTER) else 1)


def run_and_kill(command: list[str]) -> list[int]:
    """Run the command, killing one of its workers after each number of finished blocks; the killed processes."""
    killed: list[int] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        blocks = 0
        for line in running.stderr:
            print(line, end="")
            blocks += bool(re.match(r"\d+ of \d+ episodes", line))
            if len(killed) < len(KILL_AFTER) and blocks >= KILL_AFTER[len(killed)]:
                time.sleep(INTO_THE_BLOCK)
                killed.append(busy_worker(running.pid))
                os.kill(killed[-1], signal.SIGKILL)
                print(f"killed {killed[-1]}")
    if running.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {running.returncode}")
    return killed


def busy_worker(command: int) -> int:
    """The newest process below the command that runs a job."""
    below = psutil.Process(command).children(recursive=True)
    busy = [process for process in below if " ".join(process.cmdline()).startswith("ray::_run")]
    return max(busy, key=lambda process: process.create_time()).pid


def without_times(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text(encoding="utf-8"))
    del document["machine"]["created"]
    for policy in document["policies"]:
        del policy["latency"]
    return document


if __name__ == "__main__":
    main()
