"""How many sockets are open, and which give way.

A socket that says nothing costs a client nothing, so there is always room for a new one: the oldest that has not yet
become a client is closed for it. Clients keep their place until they leave.
"""

from __future__ import annotations

from collections.abc import Callable

from omega_qvla.serving.limits import Limits

Close = Callable[[], None]


class Gate:
    """Counts sockets before and after their handshake."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._arriving: dict[object, Close] = {}  # in the order in which they came
        self._admitted: set[object] = set()

    @property
    def clients(self) -> int:
        return len(self._admitted)

    @property
    def full(self) -> bool:
        return len(self._admitted) >= self._limits.connections

    def arrived(self, socket: object, close: Close) -> None:
        """A socket was opened; `close` closes it at once, and then `left` must be called."""
        if len(self._arriving) >= self._limits.handshakes:
            oldest = next(iter(self._arriving))
            self._arriving.pop(oldest)()
        self._arriving[socket] = close

    def admit(self, socket: object) -> bool:
        """Whether the socket has become a client; not if all places are taken."""
        self._arriving.pop(socket, None)
        if self.full:
            return False
        self._admitted.add(socket)
        return True

    def left(self, socket: object) -> None:
        """A socket was closed, whatever it was."""
        self._arriving.pop(socket, None)
        self._admitted.discard(socket)

    def close_arriving(self) -> None:
        """Close all sockets that are no clients yet."""
        for close in list(self._arriving.values()):
            close()
