"""Meta-World: ten tasks as the bundled policy was trained on them, or all fifty as lerobot shows them.

suite         tasks as a benchmark
task          one task of MT10 with two cameras of ours
lerobot_task  one task in lerobot's own environment
"""

from omega_qvla.evaluation.metaworld.suite import metaworld_mt10, metaworld_suite

__all__ = ["metaworld_mt10", "metaworld_suite"]
