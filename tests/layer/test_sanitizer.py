"""The sparse kernels touch no memory but their own: the core's own test, built with the sanitizers."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLAIN = ("interrupt", "threads", "csr", "csr_levels", "csr_multiply", "csr_plain")
LEVELS = {
    "csr_avx2": ["-mavx2", "-mfma"],
    "csr_avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mpopcnt"],
}
COMPILER = shutil.which("c++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.skipif(platform.system() != "Linux", reason="needs the sanitizers' libraries")
def test_no_kernel_leaves_its_arrays(tmp_path):
    flags = ["-std=c++20", "-O1", "-Wno-psabi", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    include = ["-I", str(ROOT / "csrc" / "include"), "-I", str(ROOT / "csrc" / "src")]
    x86 = platform.machine() in ("x86_64", "AMD64")
    core = ROOT / "csrc" / "src"
    sources = {core / f"{name}.cpp": [] for name in PLAIN}
    sources |= {core / f"{name}.cpp": own for name, own in LEVELS.items() if x86}
    sources[Path(__file__).with_name("csr_test.cpp")] = []
    objects = []
    for source, own in sources.items():
        objects.append(str(tmp_path / f"{source.stem}.o"))
        command = [COMPILER, *flags, *own, *include, "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True, capture_output=True, text=True)
    program = str(tmp_path / "csr_test")
    subprocess.run([COMPILER, *flags, *objects, "-o", program, "-lpthread"], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
