"""The device file of the CPU at hand, measured once: what a core multiplies and reads, and how large its cache is.

Source: not in the paper, whose devices are GPUs.
"""

import ctypes
import hashlib
import json
import logging
import os
import platform
from pathlib import Path

import torch

from fusion.plan.device import Device, DeviceError, parse_device
from fusion.run.cpp.build import load, target
from fusion.run.cpp.instructions import InstructionSet
from fusion.run.files import cache_root, write_whole

logger = logging.getLogger(__name__)

WIDTHS = {"amx": 16, "avx512": 16, "avx2": 8, "plain": 8}  # fp32 numbers in a vector
REGISTERS = {"amx": 512, "avx512": 512, "avx2": 128, "plain": 128}  # of 32 bits
DEFAULT_CACHE_BYTES = 1 << 20
STREAM_FLOATS = 1 << 25  # 128 MiB: more than a cache holds
SOURCE = """
#include <ctime>
#include "tiles.h"
using namespace fusion;

static double seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

// The best of several rounds: a product of tiles that lie in the first cache.
template <class T>
static double flops_per_s(float* space) {
  [[maybe_unused]] const Unit unit;
  const int64_t rows = 48, cols = 4 * W, depth = 96;
  T* const x = reinterpret_cast<T*>(space);
  T* const y = x + rows * depth;
  float* const c = space + (rows + cols) * depth;
  double best = 1e9;
  for (int round = 0; round < 40; ++round) {
    const double start = seconds();
    for (int i = 0; i < 200; ++i)
      product<6, 4>(Full(), x, depth, 1, Packed{y, depth}, 0, c, cols + 16, rows, cols, depth, false);
    best = std::min(best, (seconds() - start) / 200);
  }
  return 2.0 * double(rows * cols * depth) / best;
}

extern "C" double fp32_flops_per_s(float* space) { return flops_per_s<float>(space); }
extern "C" double bf16_flops_per_s(float* space) { return flops_per_s<Half>(space); }

extern "C" double bytes_per_s(const float* p, int64_t count) {
  double best = 1e9;
  for (int round = 0; round < 4; ++round) {
    const double start = seconds();
    V sums[8];
    for (V& sum : sums) sum = splat(0.0f);
    for (int64_t i = 0; i + 8 * W <= count; i += 8 * W)
      for (int j = 0; j < 8; ++j) sums[j] = sums[j] + load(p + i + j * W);
    volatile float kept = 0;
    for (const V& x : sums) kept = kept + sum(x);
    best = std::min(best, seconds() - start);
  }
  return 4.0 * double(count) / best;
}
"""


def this_cpu() -> Device:
    """The device of this machine's CPU: measured when it is first asked for, then read from the cache folder.

    Returns:
        All cores that this process may use.

    Raises:
        BuildError: There is no compiler.

    Source: not in the paper.
    """
    path = device_path()
    try:
        device = parse_device(json.loads(path.read_text(encoding="utf-8")), where=str(path))
    except (OSError, ValueError, DeviceError):
        device = measure_cpu()
        try:
            keep(device)
        except OSError as error:
            logger.warning("%s cannot be written, so the next process measures again: %s", path, error)
    return device


def keep(device: Device) -> Path:
    """Keep a device as this machine's.

    Args:
        device: As `measure_cpu` finds it.

    Returns:
        The file.

    Raises:
        OSError: It cannot be written.
    """
    path = device_path()
    write_whole(path, json.dumps(vars(device), indent=1))
    return path


def device_path() -> Path:
    """Where the device file of this machine lies: in the cache folder, under its CPU's name."""
    digest = hashlib.sha256(f"{_cpu_name()} {_num_cores()} {target().name}".encode()).hexdigest()[:12]
    return cache_root() / "devices" / f"cpu_{digest}.json"


def measure_cpu() -> Device:
    """Measure this machine's CPU.

    Returns:
        The device.

    Raises:
        BuildError: There is no compiler.

    Source: not in the paper.
    """
    instructions = target()
    library = load(SOURCE, instructions)
    for name in ("fp32_flops_per_s", "bf16_flops_per_s", "bytes_per_s"):
        getattr(library, name).restype = ctypes.c_double
    space = torch.full((STREAM_FLOATS,), 0.5)
    address = ctypes.c_void_p(space.data_ptr())
    fp32_flops_per_s = float(library.fp32_flops_per_s(address))
    bf16_flops_per_s = float(library.bf16_flops_per_s(address))
    bytes_per_s = float(library.bytes_per_s(address, ctypes.c_int64(STREAM_FLOATS)))
    return _device(instructions, fp32_flops_per_s, bf16_flops_per_s, bytes_per_s)


def _device(
    instructions: InstructionSet, fp32_flops_per_s: float, bf16_flops_per_s: float, bytes_per_s: float
) -> Device:
    cores, cache_bytes = _num_cores(), _cache_bytes()
    name = _cpu_name()
    return Device(
        name="cpu",
        origin=f"Measured on {name}: a product of tiles in the first cache, and a sum over 128 MiB, by one core.",
        kind="cpu",
        arch=instructions.name,
        fp32_flops_per_s=fp32_flops_per_s * cores,
        fp16_flops_per_s=fp32_flops_per_s * cores,
        bf16_flops_per_s=bf16_flops_per_s * cores,
        dram_bytes_per_s=bytes_per_s,
        num_sms=cores,
        shared_bytes_per_block=cache_bytes,
        shared_bytes_per_sm=cache_bytes,
        registers_per_sm=REGISTERS[instructions.name],
        warp_size=WIDTHS[instructions.name],
    )


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache_bytes() -> int:
    """A core's second cache."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text(encoding="utf-8").strip()
    except OSError:
        return DEFAULT_CACHE_BYTES
    return int(text[:-1]) << 10 if text.endswith("K") and text[:-1].isdigit() else DEFAULT_CACHE_BYTES
