#!/usr/bin/env python
"""The tests of the compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer (gcc).

    python scripts/sanitize_kernels.py [PYTEST ARGUMENTS]

The kernels are built anew with the sanitizers into a temporary directory, and take the place of those installed for
one run. Any report ends it with an error.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
TESTS = ("tests/kernels/test_native.py", "tests/kernels/test_rounding.py", "tests/runtime")

RUN = """
import importlib.util, sys
import torch  # first, as in the package
spec = importlib.util.spec_from_file_location("omega_qvla._native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["omega_qvla._native"] = module
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        built = build(Path(scratch))
        runtime = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True).strip()
        # Python itself never frees everything; and gcc's runtime has to be loaded before everything else.
        environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1"}
        command = [sys.executable, "-c", RUN, str(built), *(arguments or TESTS)]
        return subprocess.call(command, cwd=ROOT, env=environment)


def build(scratch: Path) -> Path:
    """The compiled module with sanitizers."""
    wheel = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-q", "-w", str(scratch)]
    subprocess.check_call([*wheel, "-C", "cmake.define.OMEGA_QVLA_SANITIZE=ON"])
    with ZipFile(next(scratch.glob("*.whl"))) as archive:
        names = [name for name in archive.namelist() if name.startswith("omega_qvla/_native")]
        if not names:
            raise SystemExit("error: the kernels were not compiled; install gcc and its sanitizers")
        return Path(archive.extract(names[0], scratch))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
