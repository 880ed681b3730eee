"""What a client is told when it does not get actions."""

from __future__ import annotations

from typing import Literal

Reason = Literal["size", "message", "fields", "array", "values", "token", "busy", "slow", "stopping", "policy"]
"""Counted in the metrics: a message over the size limit; one that is no message of the protocol; a field missing or
unknown; an array of another dtype or shape; NaN or infinity; a wrong token; too many observations or connections; a
message or answer that took too long; the server stops; the policy could not answer."""


class Refusal(Exception):  # noqa: N818  # it is an answer, not a failure
    """One sentence for the client, which names what is wrong and the way out."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason: Reason = reason
