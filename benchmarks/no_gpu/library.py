"""A CUDA driver and runtime that answer and compute nothing, built for this process and put in front of torch."""

import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

MARK = "MEGALITH_NO_GPU"
# Numbers of attributes in cuda.h: multiprocessors, warp size, registers and shared memory of one, capability, clock.
_DEVICE = {16: 132, 10: 32, 82: 65536, 97: 227 << 10, 75: 9, 76: 0, 36: 1980000}
_FUNCTION = {0: 1024, 4: 64}  # threads of a block, registers of a thread
_OTHERS = """
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
"""


def enter() -> None:
    """Start this program anew with the libraries in front; returns in the program that was started so."""
    if folder_of_libraries := os.environ.get(MARK):
        atexit.register(shutil.rmtree, folder_of_libraries, ignore_errors=True)
        return
    # The headers of the very runtime that torch was built with come with it, but for a few, which come with Triton.
    packages = Path(_origin("torch")).parents[1]
    header = next(packages.glob("nvidia/*/include/driver_types.h"), None)
    if header is None or find_spec("triton") is None:
        sys.exit("Needs a CUDA build of torch.")
    others = Path(_origin("triton")).parent / "backends" / "nvidia" / "include"
    folder = Path(tempfile.mkdtemp())
    (folder / "driver.c").write_text(driver_source(header.with_name("cuda.h").read_text()))
    _build(folder / "libcuda.so.1", folder / "driver.c", "-Wl,-soname,libcuda.so.1")
    _build(folder / "device.so", Path(__file__).parent / "device.c", f"-I{header.parent}", f"-I{others}")
    environment = {
        **os.environ,
        MARK: str(folder),
        "LD_PRELOAD": str(folder / "device.so"),
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),
    }
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _origin(package: str) -> str:
    found = find_spec(package)
    assert found is not None and found.origin is not None, f"needs {package}"
    return found.origin


def driver_source(header: str) -> str:
    """C of a driver whose every function succeeds and does nothing, but for the few that are asked for numbers."""
    answers = [_asked("cuDeviceGetAttribute", _DEVICE), _asked("cuFuncGetAttribute", _FUNCTION), _OTHERS]
    answered = set(re.findall(r"int (cu\w+)", "".join(answers)))
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", header)) - answered)
    return "\n".join([*(f"int {name}(void) {{ return 0; }}" for name in names), *answers])


def _asked(name: str, values: dict[int, int]) -> str:
    cases = " ".join(f"case {number}: *value = {found}; break;" for number, found in values.items())
    return (
        f"int {name}(int *value, int what, void *of) {{ switch (what) {{ {cases} default: *value = 1; }} return 0; }}"
    )


def _build(made: Path, source: Path, *flags: str) -> None:
    subprocess.run(["cc", "-w", "-shared", "-fPIC", *flags, "-o", str(made), str(source)], check=True)
