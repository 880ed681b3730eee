"""How much of the server one client, or all of them, may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Everything that would otherwise grow with what clients send. Times are in seconds."""

    connections: int = 16
    """Clients at a time. Each has at most one observation in the queue."""
    handshakes: int = 32
    """Sockets that have not yet said who they are; the oldest gives way to a new one."""
    waiting: int = 16
    """Observations that wait for the policy."""
    handshake_seconds: float = 5.0
    message_seconds: float = 10.0
    """From the first to the last byte of a message, and for an answer to be taken."""
    idle_seconds: float = 600.0
    """Between two messages of a client."""
    ping_seconds: float = 10.0
    """Between two signs of life, and for each to be answered."""
    stop_seconds: float = 10.0
    """For the inference that runs when the server is stopped."""
    stuck_seconds: float = 60.0
    """After which an inference that has not ended makes the server unhealthy."""
    fields: int = 128
    """Maps, lists and values of a message, all together."""
    depth: int = 4
    """Of maps and lists in each other."""
    prompt_characters: int = 1000
    image_pixels: int = 1920 * 1080
    """Of a camera for which the policy states no size."""
