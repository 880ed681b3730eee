"""A few hundred of the attacks of `scripts/fuzz_server.py`, which sends ten thousand to a server of its own."""

from __future__ import annotations

import psutil
import pytest
from running import Declared, running, settings

from fuzz_server import Attacker, Good


@pytest.mark.parametrize("protocol", ["openpi", "groot"])
def test_bad_clients_do_not_stop_a_good_one(protocol: str) -> None:
    with running(Declared(), settings(protocol)) as server:
        attacker = Attacker(protocol, server.address.port, seed=1, size=8, state=2, action=2)
        good, process = Good(attacker), psutil.Process()
        good.ask()
        before = process.memory_info().rss
        for count in range(150):
            attacker.attack()
            if count % 10 == 0:
                good.ask()
        attacker.let_go()
        good.ask()
        assert process.memory_info().rss - before < 64 * 2**20
        assert server.page("/healthz") == "OK\n"
        refused = {
            reason: server.metric(f'refused_total{{reason="{reason}"}}')
            for reason in ("message", "array", "size", "values")
        }
        assert all(refused.values()), refused
        good.close()


@pytest.mark.parametrize("protocol", ["openpi", "groot"])
def test_no_wrong_chunk_is_continued(protocol: str) -> None:
    with running(Declared(), settings(protocol)) as server:
        attacker = Attacker(protocol, server.address.port, seed=2, size=8, state=2, action=2)
        for _ in range(80):
            attacker.wrong_chunk()
        assert server.metric("answered_total") == 0
        refused = {
            reason: server.metric(f'refused_total{{reason="{reason}"}}') for reason in ("array", "fields", "values")
        }
        assert all(refused.values()) and sum(refused.values()) == 80, refused
