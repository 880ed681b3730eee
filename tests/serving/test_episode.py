"""The command itself: openpi's client acts in the simulator with what a quantized policy answers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from omega_qvla import api
from omega_qvla.spec import read_recipe, with_settings


@contextmanager
def command(*arguments: object) -> Iterator[int]:
    """`omega-qvla serve` on a free port while open; it must end well when it is told to."""
    program = [str(Path(sys.executable).with_name("omega-qvla")), "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        first = next(line for line in lines if "listening on" in line or "error" in line)
        yield int(first.split(":")[2].split(",")[0])
    finally:
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "Traceback" not in errors, errors


@pytest.mark.slow
@pytest.mark.skipif(find_spec("metaworld") is None, reason="needs Meta-World")
def test_an_episode_to_success(tmp_path: Path) -> None:
    from omega_qvla.evaluation.metaworld.suite import MAX_STEPS
    from omega_qvla.evaluation.metaworld.task import MetaWorldTask

    bundled, quantized = api.bundled_checkpoint(), tmp_path / "rtn-w8"
    api.quantize(bundled, with_settings(read_recipe("rtn"), ["weight.bits=8", "activation.bits=8"]), quantized)
    report = tmp_path / "shadow.json"
    task = MetaWorldTask("drawer-close-v3")
    task.reset(0)
    with command(quantized, "--protocol", "openpi", "--shadow", bundled, "--shadow-json", report) as port:
        client = WebsocketClientPolicy("127.0.0.1", port)
        robot = ActionChunkBroker(client, client.get_server_metadata()["execute_steps"])
        solved = False
        for _ in range(MAX_STEPS):
            seen = {f"observation/{name}": image for name, image in task.images().items()}
            sent = seen | {"observation/state": task.proprioception(), "prompt": task.instruction}
            solved = task.step(robot.infer(sent)["actions"])
            if solved:
                break
    task.close()
    assert solved
    found = json.loads(report.read_text())
    assert found["observations"] + found["dropped"] >= 1 and found["failed"] == 0
    assert found["reference"] == "full precision" and max(found["maximum_error_per_dimension"]) < 1
