"""Makes lerobot's programs know `--policy.type=omega_qvla` and `--env.type=omega_qvla_metaworld`.

All of it is in `omega_qvla.lerobot_plugin`, which registers itself when it is imported.
"""

from omega_qvla.lerobot_plugin import configuration_omega_qvla, environment

__all__ = ["configuration_omega_qvla", "environment"]
