"""NVIDIA GPUs as their compiler describes them, so that it compiles for a GPU that is not there.

XLA compiles for a description of the device: a `GpuTargetConfigProto` in text form. The facts are
here as a table, from which `target_text` writes the description.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from MaxNano.distributed import hardware

if TYPE_CHECKING:
    import jax

KIB, MIB = 2**10, 2**20


class Architecture(NamedTuple):
    """What all GPUs of a compute capability have in common, per streaming multiprocessor (SM)."""

    threads: int
    shared_memory_bytes: int
    float32_units: int
    accelerated: bool = False  # has instructions of this capability alone, such as sm_90a


class Gpu(NamedTuple):
    """A GPU; its peak FLOP/s and its bandwidth are in the chip table."""

    device_kind: str  # its row of hardware.CHIPS
    compute_capability: str
    multiprocessors: int
    clock_ghz: float  # boost
    l2_bytes: int
    memory_bytes: int  # as the driver reports them
    link_bandwidth: float | None = None  # NVLink bytes/s to the other GPUs, in one direction


# By compute capability. Source: the table of technical specifications in NVIDIA's CUDA programming
# guide, https://docs.nvidia.com/cuda/cuda-c-programming-guide.
ARCHITECTURES = {
    "8.0": Architecture(2048, 164 * KIB, 64),
    "8.9": Architecture(1536, 100 * KIB, 128),
    "9.0": Architecture(2048, 228 * KIB, 128, accelerated=True),
    "10.0": Architecture(2048, 228 * KIB, 128, accelerated=True),
    "12.0": Architecture(1536, 100 * KIB, 128),
}

# By the name that compile_topology takes, without the number of devices.
# Sources: the figures of a100_sxm_80, h100_sxm, h200, b200 and rtx6000pro are those of openxla/xla,
# xla/backends/gpu/target_config/specs at 4336d12. XLA has no description of the RTX 4090 and the
# L40S: theirs are NVIDIA's published figures (Ada white paper, data sheet of the L40S), with the
# memory that nvidia-smi shows. NVLink: half of the data sheets' sum over both directions.
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", "8.0", 108, 1.41, 40 * MIB, 85_100_068_864, link_bandwidth=300e9
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", "9.0", 132, 1.98, 50 * MIB, 84_942_979_072, link_bandwidth=450e9
    ),
    "h200": Gpu("NVIDIA H200", "9.0", 132, 1.98, 50 * MIB, 151_397_597_184, link_bandwidth=450e9),
    "b200": Gpu(
        "NVIDIA B200", "10.0", 148, 1.965, 132_644_864, 191_514_411_008, link_bandwidth=900e9
    ),
    "l40s": Gpu("NVIDIA L40S", "8.9", 142, 2.52, 96 * MIB, 46_068 * MIB),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", "8.9", 128, 2.52, 72 * MIB, 24_564 * MIB),
    "rtx6000pro": Gpu(
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "12.0", 188, 2.6, 128 * MIB, 96 * 2**30
    ),
}

# The share of a GPU's memory that JAX takes by default.
# Source: https://docs.jax.dev/en/latest/gpu_memory_allocation.html
DEFAULT_MEMORY_SHARE = 0.75

DEVICES_WITH_LINKS = (1, 8)  # of a host whose GPUs NVLink connects; other hosts have one here

# The compiler plans attention for this version of cuDNN; newer ones run it too.
CUDNN_VERSION = (9, 10, 0)

# A block may have all of an SM's shared memory but what the driver keeps.
_RESERVED_SHARED_MEMORY = KIB


def topology_names() -> list[str]:
    """All names that compile_topology takes for GPUs."""
    return [
        f"{name}-{count}"
        for name, gpu in GPUS.items()
        for count in (DEVICES_WITH_LINKS if gpu.link_bandwidth else (1,))
    ]


def gpu_of(device_kind: str) -> Gpu | None:
    """The GPU that a device_kind of JAX names, None if the table does not have it."""
    return next((gpu for gpu in GPUS.values() if gpu.device_kind == device_kind), None)


def program_memory_bytes(gpu: Gpu) -> int:
    """Bytes of a GPU that is not there which JAX would take, by the variables that it reads."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    share = float(next(filter(None, map(os.environ.get, names)), DEFAULT_MEMORY_SHARE))
    return int(share * gpu.memory_bytes)


def compute_capability(device: jax.Device) -> str:
    """The compute capability of a device, such as "9.0"; "" if it is unknown.

    Devices that are only compiled for do not have the attribute. Of AMD's GPUs JAX gives the
    architecture instead, such as "gfx942".
    """
    known = gpu_of(device.device_kind)
    return getattr(device, "compute_capability", known.compute_capability if known else "")


def target_text(gpu: Gpu) -> str:
    """The description of a GPU for XLA, a GpuTargetConfigProto in text form."""
    architecture = ARCHITECTURES[gpu.compute_capability]
    major, _, minor = gpu.compute_capability.partition(".")
    extension = "ACCELERATED_FEATURES" if architecture.accelerated else "NONE"
    fields = {
        "name": f'"{gpu.device_kind}"',
        "device_vendor": '"NVIDIA Corporation"',
        "core_count": gpu.multiprocessors,
        "clock_rate_ghz": gpu.clock_ghz,
        "fpus_per_core": architecture.float32_units,
        "memory_bandwidth": round(hardware.CHIPS[gpu.device_kind].memory_bandwidth),
        "device_memory_size": gpu.memory_bytes,
        "l2_cache_size": gpu.l2_bytes,
        "shared_memory_per_core": architecture.shared_memory_bytes,
        "shared_memory_per_block_optin": architecture.shared_memory_bytes - _RESERVED_SHARED_MEMORY,
        "threads_per_core_limit": architecture.threads,
        # The same for all architectures.
        "shared_memory_per_block": 48 * KIB,
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "device_address_bits": 64,
    }
    lines = [f"  {name}: {value}" for name, value in fields.items()]
    cudnn = " ".join(
        f"{name}: {number}"
        for name, number in zip(("major", "minor", "patch"), CUDNN_VERSION, strict=True)
    )
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            f"  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}",
            "}",
            'platform_name: "CUDA"',
            f"dnn_version_info {{ {cudnn} }}",
            f'device_description_str: "{gpu.device_kind}"',
            "",
        ]
    )
