"""LIBERO, the papers' benchmark: four suites of ten tasks, each with fifty initial states.

profile       how a harness runs it: limits, waiting, replanning, images, initial states
installation  whether the package and its assets are there
suite         a suite as a benchmark
task          one task, as lerobot's environment runs it
"""

from omega_qvla.evaluation.libero.installation import LiberoError
from omega_qvla.evaluation.libero.suite import libero_suite

__all__ = ["LiberoError", "libero_suite"]
