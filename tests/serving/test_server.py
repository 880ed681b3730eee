"""Where a server may listen, and what starts and ends it."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path
from queue import Queue

import numpy as np
import pytest
from running import Declared, running, settings

from omega_qvla.cli.serving import _NeverWaits
from omega_qvla.serving import Address, check_exposure, read_token, run


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "robot.local", ""])
def test_other_machines_need_a_token(host: str) -> None:
    with pytest.raises(ValueError, match="--token-file"):
        check_exposure(host, None)
    check_exposure(host, b"x" * 16)
    with pytest.raises(ValueError, match="--token-file"):
        asyncio.run(run(Declared(), settings(), Address(host, 0)))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    check_exposure(host, None)


@pytest.mark.parametrize("text", ["", "short", "two words of some length", "ü" * 20])
def test_a_token_is_one_long_word(text: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no token"):
        read_token(path)


def test_the_end_of_the_line_is_no_part_of_the_token(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n")
    assert read_token(path) == b"0123456789abcdef"


@pytest.mark.parametrize("protocol", ["openpi", "groot"])
def test_a_port_that_is_taken_is_an_error(protocol: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address("127.0.0.1", taken.getsockname()[1], 0 if protocol == "groot" else None)
        with pytest.raises(OSError, match="address already in use"):
            asyncio.run(run(Declared(), settings(protocol), address))


def test_a_policy_that_cannot_infer_is_not_served() -> None:
    class Broken(Declared):
        def infer(self, observation: object, noise: object) -> np.ndarray:
            raise ValueError("it is broken")

    with pytest.raises(ValueError, match="it is broken"):
        asyncio.run(run(Broken(), settings(), Address("127.0.0.1", 0)))


@pytest.mark.parametrize("protocol", ["openpi", "groot"])
def test_it_ends_when_it_is_told(protocol: str) -> None:
    with running(Declared(), settings(protocol)) as server:
        assert server.page("/healthz") == "OK\n"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.address.port))


def test_a_log_that_nobody_reads_stops_nothing() -> None:
    lines: Queue[logging.LogRecord] = Queue(2)
    logger = logging.Logger("unread")
    logger.addHandler(_NeverWaits(lines))
    for number in range(5):
        logger.warning("line %d", number)
    assert [lines.get().getMessage() for _ in range(2)] == ["line 0", "line 1"] and lines.empty()
