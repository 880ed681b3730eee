"""Policy servers: one policy behind openpi's or GR00T's protocol, for robots that already speak it.

What comes over the wire is checked against what the policy declares before anything is made of it.
"""

from omega_qvla.serving.server import PORTS, Address, Settings, check_exposure, read_token, run

__all__ = ["PORTS", "Address", "Settings", "check_exposure", "read_token", "run"]
