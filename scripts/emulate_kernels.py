#!/usr/bin/env python
"""The AVX-512 VNNI kernels on a processor that this machine may not be: Bochs' Ice Lake.

    apt-get install bochs bochs-term bochsbios vgabios isolinux syslinux-common genisoimage
    python scripts/emulate_kernels.py

They are linked with a check (`emulated/`) into a program that needs no operating system, and compared with 64-bit
integers and with the portable kernels. It takes some minutes; any difference is an error.
"""

from __future__ import annotations

import pty
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE, CSRC = Path(__file__).parent / "emulated", Path(__file__).parents[1] / "csrc"
FLAGS = [
    *("-std=c++17", "-O2", "-ffp-contract=off", "-DOMEGA_QVLA_X86", f"-I{CSRC}", f"-I{HERE}"),
    *("-fno-exceptions", "-fno-rtti", "-fno-stack-protector", "-fno-pic", "-mno-red-zone", "-fno-threadsafe-statics"),
]
AVX512 = ["-O3", *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")), "-mfma"]
SOURCES = {
    HERE / "start.S": [],
    HERE / "runtime.cpp": ["-fno-builtin", "-fno-tree-loop-distribute-patterns"],
    HERE / "check.cpp": [],
    CSRC / "pack_weight.cpp": [],
    CSRC / "portable.cpp": [],
    CSRC / "avx512_vnni.cpp": AVX512,
}
LOADER = [
    Path("/usr/lib/ISOLINUX/isolinux.bin"),
    *(Path("/usr/lib/syslinux/modules/bios") / name for name in ("ldlinux.c32", "mboot.c32", "libcom32.c32")),
]
MENU = "default check\nprompt 0\ntimeout 1\nlabel check\n kernel mboot.c32\n append /check.bin\n"
MACHINE = """\
plugin_ctrl: unmapped=1, biosdev=1, extfpuirq=1, serial=1
config_interface: textconfig
display_library: term
cpu: model=corei7_icelake_u, ips=20000000
memory: guest=512, host=512
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0: enabled=1
ata0-master: type=cdrom, path={scratch}/disc.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={scratch}/said
log: {scratch}/log
panic: action=fatal
error: action=ignore
info: action=ignore
"""
PATIENCE = 1800
"""Seconds."""


def main() -> int:
    if missing := [path for path in LOADER if not path.is_file()]:
        raise SystemExit(f"error: {missing[0]} is missing; install what the head of this file names")
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch))
        said = run(Path(scratch))
    print(said, end="")
    wrong = [line for line in said.splitlines() if line.endswith("wrong") and ": 0 of" not in line]
    return 1 if wrong or not said.endswith("end\n") else 0


def build(scratch: Path) -> None:
    """A disc that a BIOS boots."""
    objects = []
    for source, flags in SOURCES.items():
        objects.append(scratch / f"{source.stem}.o")
        subprocess.check_call(["g++", *FLAGS, *flags, "-c", str(source), "-o", str(objects[-1])])
    program, disc = scratch / "check.elf", scratch / "disc"
    (disc / "isolinux").mkdir(parents=True)
    quiet = ["--no-warn-rwx-segments"]
    subprocess.check_call(["ld", "-T", str(HERE / "layout.ld"), *quiet, "-o", str(program), *map(str, objects)])
    subprocess.check_call(["objcopy", "-O", "binary", str(program), str(disc / "check.bin")])
    for path in LOADER:
        (disc / "isolinux" / path.name).write_bytes(path.read_bytes())
    (disc / "isolinux/isolinux.cfg").write_text(MENU)
    boot = ["-b", "isolinux/isolinux.bin", "-c", "isolinux/boot", "-no-emul-boot", "-boot-load-size", "4"]
    image = ["-quiet", "-boot-info-table", "-o", str(scratch / "disc.iso"), str(disc)]
    subprocess.check_call(["genisoimage", *boot, *image])


def run(scratch: Path) -> str:
    """What the program says on its serial line until its end, or until patience is at an end."""
    (scratch / "machine").write_text(MACHINE.format(scratch=scratch))
    (scratch / "commands").write_text("continue\n")  # of Bochs' debugger
    said = scratch / "said"
    _, terminal = pty.openpty()
    command = ["bochs", "-q", "-f", str(scratch / "machine"), "-rc", str(scratch / "commands")]
    bochs = subprocess.Popen(command, stdin=terminal, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun = time.monotonic()
    while bochs.poll() is None and time.monotonic() - begun < PATIENCE:
        if said.is_file() and said.read_text(errors="replace").endswith("end\n"):
            break
        time.sleep(1)
    bochs.kill()
    return said.read_text(errors="replace") if said.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
