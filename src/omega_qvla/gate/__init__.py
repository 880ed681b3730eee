"""The gate before a robot moves: a quantized policy's actions against full precision's, with limits.

The quantized policy moves nothing for it, not even a simulated robot: both answer the same held-out observations
under the same noise, and full precision once more under other noise, which says how far its own actions spread.
"""

from omega_qvla.gate.check import check
from omega_qvla.gate.verdict import GateCheck, GateReport, Gripper

__all__ = ["GateCheck", "GateReport", "Gripper", "check"]
