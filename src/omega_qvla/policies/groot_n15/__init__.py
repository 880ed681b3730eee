"""GR00T N1.5, which current lerobot no longer has."""

from omega_qvla.policies.groot_n15.architecture import RELEASED, Architecture
from omega_qvla.policies.groot_n15.model import GrootN15, Inputs

__all__ = ["RELEASED", "Architecture", "GrootN15", "Inputs"]
