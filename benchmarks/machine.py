# SPDX-License-Identifier: MIT
"""The machine: its description, and its peaks as measured in the same run."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

import convmixer_kernels
from benchmarks import timing

#: Packages whose versions a file records, beside torch's.
_PEERS = ("numpy", "onnxruntime", "openvino", "triton")
ROOT = Path(__file__).resolve().parent.parent

# Enough chains of dependent multiply-adds to hide their latency (4 cycles, 2 a cycle), and few enough to stay in registers.
_FMA_SOURCE = """
#include <omp.h>
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
typedef float vector __attribute__((vector_size(WIDTH * 4)));
double fma_flops(int threads, long rounds, float* sink) {
  double start = omp_get_wtime();
#pragma omp parallel num_threads(threads)
  {
    // equal chains would be one to the compiler
    vector sums[12];
    for (int j = 0; j < 12; ++j) sums[j] = (vector){0} + (float)j;
    vector factor = {0}, step = {0};
    factor += 0.999f, step += 0.001f + omp_get_thread_num();
    for (long i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
      for (int j = 0; j < 12; ++j) sums[j] = sums[j] * factor + step;
    }
    for (int j = 1; j < 12; ++j) sums[0] += sums[j];
    sink[omp_get_thread_num()] = sums[0][0];
  }
  return 2.0 * 12 * WIDTH * rounds * threads / (omp_get_wtime() - start);
}
"""


class Peaks(NamedTuple):
    """The best of several tries each, per second."""

    copy: float  # bytes read and written
    fma: float  # float32 FLOPs of independent multiply-adds
    gemm: dict[str, float]  # FLOPs of a matrix product, or on a CPU of a 1x1 convolution, by dtype
    fma_source: str  # how `fma` was found


def measure_peaks(device: torch.device, dtypes: Iterable[str], small: bool = False) -> Peaks:
    """Copy bandwidth, FMA and matrix products.

    Args:
        dtypes: names of torch dtypes.
        small: sizes that take no time, for tests; their figures mean nothing.
    """
    on_cpu = device.type == "cpu"
    size, elements = (1024, 1 << 25) if on_cpu else (8192, 1 << 28)
    size, elements = (64, 1 << 12) if small else (size, elements)
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _best(lambda: target.copy_(source), device)
    gemm = {}
    for name in sorted({*dtypes, "float32"}):
        matrix = torch.randn(size, size, device=device).to(getattr(torch, name))
        product = torch.empty_like(matrix)
        taken = _best(lambda m=matrix, p=product: torch.mm(m, m, out=p), device)
        if on_cpu:
            # on CPUs another library runs this one, and either may be the faster
            image, weight = matrix.view(1, size, size // 8, 8), matrix.view(size, size, 1, 1)
            taken = min(taken, _best(lambda x=image, w=weight: torch.nn.functional.conv2d(x, w), device))
        gemm[name] = 2 * size**3 / taken
    # torch.mm takes no tf32 unless asked: a GPU's float32 product runs on the multiply-add units
    fma, found_by = (0.0, "float32 matrix product") if not on_cpu else _native_fma(1000 if small else 4_000_000)
    return Peaks(copy, max(fma, gemm["float32"]), gemm, found_by)


def _best(call, device: torch.device, seconds: float = 0.3) -> float:
    call()
    tries = max(5, min(200, int(seconds / timing.elapsed(call, device))))
    return min(timing.elapsed(call, device) for _ in range(tries))


def _native_fma(rounds: int) -> tuple[float, str]:
    """By a loop that the machine's C compiler makes for this CPU; 0 without one."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma.so"
        command = ["cc", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-x", "c", "-", "-o", str(library)]
        try:
            subprocess.run(command, input=_FMA_SOURCE, text=True, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return 0.0, f"float32 matrix product: no loop of multiply-adds was compiled: {error}"
        function = ctypes.CDLL(str(library)).fma_flops
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_long, ctypes.c_void_p]
        threads = torch.get_num_threads()
        sink = (ctypes.c_float * threads)()
        return max(function(threads, rounds, ctypes.addressof(sink)) for _ in range(5)), "a loop of multiply-adds"


def last_level_cache(device: torch.device) -> int:
    """Bytes of the cache that buffers must exceed; 32 MiB if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = (path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return max((int(text[:-1]) << 10 for text in sizes if text.endswith("K")), default=32 << 20)


def confine(threads: int) -> None:
    """Keep this process on as many cores as it has threads.

    Single threads are not bound: a pool that another library starts from a bound thread would inherit its one core.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def describe(device: torch.device, backend: str | None) -> dict[str, object]:
    """The machine, the versions and the settings, ready for JSON."""
    info = convmixer_kernels.build_info()
    automatic = info["operators"].get(device.type, {}).get("mixer_layer", {}).get("backend")
    gpu = {}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        gpu = {"capability": f"{found.major}.{found.minor}", "multiprocessors": found.multi_processor_count}
        gpu |= {"memory_bytes": found.total_memory, "allow_tf32": torch.backends.cudnn.allow_tf32}
    return {
        "device": torch.cuda.get_device_name(device) if gpu else cpu_name(),
        "device_type": device.type,
        **gpu,
        "cpu": cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "convmixer_kernels": info["version"],
        "backend": automatic if backend is None else backend,
        "backends": {name: _without_paths(backend) for name, backend in info["backends"].items()},
        "commit": commit(),
        "date": now(),
    }


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def session(device: torch.device, peaks: Peaks) -> dict[str, object]:
    """What may differ between the runs that fill one file: a row's "session" is the index of its own."""
    return {
        "date": now(),
        "load": os.getloadavg()[0],
        "peaks": peaks._asdict(),
        "cache_bytes": last_level_cache(device),
        "versions": {each.name: each.version for each in metadata.distributions() if each.name in _PEERS},
    }


def _without_paths(backend: dict[str, object]) -> dict[str, object]:
    """An import error names files of this machine; only the part inside the package or its sources stays."""
    inside = re.compile(r"/[^\s()]*/(?=convmixer_kernels/|csrc\b)")
    return {key: inside.sub("", value) if isinstance(value, str) else value for key, value in backend.items()}


def cpu_name() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this source tree, with "-dirty" if tracked files differ from it; None outside a git checkout."""
    try:
        command = ["git", "rev-parse", "--short=12", "HEAD"]
        head = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")
