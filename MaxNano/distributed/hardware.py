"""Facts about devices, and what follows from them: chip table, memory, dtypes, compiler flags."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ml_collections import FrozenConfigDict

if TYPE_CHECKING:  # the chip table is read by programs that never import JAX
    import jax

# ---- Chips --------------------------------------------------------------------------------------


class Chip(NamedTuple):
    """One JAX device according to its vendor's data sheet."""

    peak_flops: float  # bfloat16 FLOP/s, dense, summed in float32; fp16 where it has no bfloat16
    memory_bytes: float
    memory_bandwidth: float  # bytes/s
    clock_hz: float | None = None
    # The part of memory_bytes that the compiler gives to a program.
    program_memory_bytes: int | None = None
    # Bytes/s of one link between chips of a slice, in one direction.
    ici_link_bandwidth: float | None = None
    # Bytes/s from one chip to other slices, in one direction.
    dcn_bandwidth: float | None = None
    price: float | None = None  # USD per chip-hour, as the comment of its rows says


def _gib(count: float) -> int:
    return int(count * 2**30)


# By jax.Device.device_kind. A new chip is a row here, below the address of its vendor's figures.
# TPUs: a v4 or v5p chip is one device, a TPU7x chip two, each with half of the chip's networks.
# Clock and networks: https://jax-ml.github.io/scaling-book/tpus and peak FLOP/s over the matrix
# units' FLOPs per cycle, for TPU7x those of v6e. Program memory: libtpu's message for a program
# that is too large.
# NVIDIA and AMD: figures without sparsity, which GPUs of one name may miss at a lower power limit.
# Prices, which change: of TPUs spot in us-central1, June 2026 (https://cloud.google.com/tpu/pricing);
# of GPUs a machine with one on demand at AWS in us-east-1, 2026
# (https://aws.amazon.com/ec2/pricing/on-demand).
CHIPS = {
    # https://docs.cloud.google.com/tpu/docs/v4
    "TPU v4": Chip(275e12, 32 * 2**30, 1.228e12, 1.05e9, _gib(30.75), 45e9, 6.25e9),
    # https://docs.cloud.google.com/tpu/docs/v5e
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 0.819e12, 1.5e9, _gib(15.75), 45e9, 3.125e9),
    # https://docs.cloud.google.com/tpu/docs/v5p
    "TPU v5": Chip(459e12, 95 * 2**30, 2.765e12, 1.75e9, _gib(95.74), 90e9, 6.25e9),
    "TPU v5p": Chip(459e12, 95 * 2**30, 2.765e12, 1.75e9, _gib(95.74), 90e9, 6.25e9),
    # https://docs.cloud.google.com/tpu/docs/v6e
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1.638e12, 1.75e9, _gib(31.25), 90e9, 12.5e9, 0.540137),
    "TPU v6e": Chip(918e12, 32 * 2**30, 1.638e12, 1.75e9, _gib(31.25), 90e9, 12.5e9, 0.540137),
    # https://docs.cloud.google.com/tpu/docs/tpu7x
    "TPU7x": Chip(2307e12 / 2, 192 * 2**30 / 2, 7.38e12 / 2, 2.2e9, None, 100e9 / 2, 12.5e9 / 2),
    # https://www.nvidia.com/en-us/data-center/a100
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1.555e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2.039e12),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 80e9, 1.935e12),
    # https://www.nvidia.com/en-us/data-center/h100; of the PCIe card NVIDIA's H100 data sheet
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3.35e12, price=6.88),  # p5.4xlarge
    "NVIDIA H100 NVL": Chip(835e12, 94e9, 3.9e12),
    "NVIDIA H100 PCIe": Chip(756e12, 80e9, 2.0e12),
    # https://www.nvidia.com/en-us/data-center/h200
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12),
    "NVIDIA H200 NVL": Chip(835e12, 141e9, 4.8e12),
    # https://www.nvidia.com/en-us/data-center/dgx-b200: an eighth of its machine
    "NVIDIA B200": Chip(2250e12, 180e9, 8.0e12),
    # https://www.nvidia.com/en-us/data-center/l40s
    "NVIDIA L40S": Chip(362e12, 48 * 2**30, 0.864e12, price=1.861),  # g6e.xlarge
    # https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf
    "NVIDIA A10G": Chip(70e12, 24 * 2**30, 0.6e12, price=1.006),  # g5.xlarge
    # https://www.nvidia.com/en-us/data-center/l4
    "NVIDIA L4": Chip(121e12, 24 * 2**30, 0.3e12, price=0.8048),  # g6.xlarge
    # https://www.nvidia.com/en-us/data-center/tesla-t4, which has no bfloat16: the peak is fp16's
    "Tesla T4": Chip(65e12, 16 * 2**30, 0.32e12, price=0.526),  # g4dn.xlarge
    # https://www.nvidia.com/en-us/data-center/v100, which has no bfloat16: the peak is fp16's
    "Tesla V100-SXM2-16GB": Chip(125e12, 16 * 2**30, 0.9e12, price=3.06),  # p3.2xlarge
    "Tesla V100-SXM2-32GB": Chip(125e12, 32 * 2**30, 0.9e12),
    "Tesla V100-PCIE-16GB": Chip(112e12, 16 * 2**30, 0.9e12),
    "Tesla V100-PCIE-32GB": Chip(112e12, 32 * 2**30, 0.9e12),
    # https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf
    "NVIDIA GeForce RTX 3090": Chip(71e12, 24 * 2**30, 0.936e12),
    "NVIDIA RTX A6000": Chip(154.8e12, 48 * 2**30, 0.768e12),
    # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    "NVIDIA GeForce RTX 4090": Chip(165.2e12, 24 * 2**30, 1.008e12),
    # https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf
    "NVIDIA GeForce RTX 5090": Chip(209.5e12, 32 * 2**30, 1.792e12),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/design-visualization/quadro-product-literature/NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": Chip(503.8e12, 96 * 2**30, 1.792e12),
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": Chip(438.9e12, 96 * 2**30, 1.792e12),
    # https://www.nvidia.com/en-us/data-center/rtx-pro-6000-blackwell-server-edition gives 120 TFLOP/s
    # in float32. As in the other editions, bfloat16 has four times that.
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": Chip(
        480e12,
        96 * 2**30,
        1.597e12,
        price=3.3631,  # g7e.2xlarge
    ),
    # https://www.nvidia.com/en-us/products/workstations/dgx-spark gives 1,000 TFLOP/s in FP4 with
    # sparsity, and no figure for bfloat16: an eighth is our estimate, and what users measured
    # differs widely. The memory is shared with the CPU.
    "NVIDIA GB10": Chip(125e12, 128e9, 0.273e12),
    # https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html
    "AMD Instinct MI300X": Chip(1307.4e12, 192e9, 5.3e12),
}


def chip(device: jax.Device) -> Chip | None:
    """The device's row of CHIPS, or None if it has no row (a CPU, or a chip not listed yet)."""
    return CHIPS.get(device.device_kind)


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Sum of the peak bfloat16 FLOP/s of all devices, or None if a device has no row in CHIPS."""
    chips = [chip(device) for device in devices]
    return None if None in chips else sum(c.peak_flops for c in chips)


# ---- Memory -------------------------------------------------------------------------------------


def memory_limit_bytes() -> int | None:
    """Bytes that one device of this process may use, None if unknown.

    For a CPU device: its share of the available memory of the host or container.
    """
    import jax

    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        host = host_memory_bytes()
        return None if host is None else host // len(devices)
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    known = chip(devices[0])
    return int(known.memory_bytes) if known else None


def host_memory_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of available memory on the host, limited by the cgroup; None if not on Linux.

    root: the folder that contains proc and sys.
    """
    limits = []
    for name in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(root / name)
        if text.isdigit():  # "max" means no limit
            limits.append(int(text))
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(1024 * int(line.split()[1]))
    return min(limits, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


# ---- Choices by backend -------------------------------------------------------------------------


def compute_dtype(config: FrozenConfigDict, backend: str) -> str:
    """Name of the dtype of activations and matrix products on a backend (cpu, gpu, tpu)."""
    return config.dtype or ("float32" if backend == "cpu" else "bfloat16")


def embedding_dtype(config: FrozenConfigDict, backend: str) -> str:
    """Name of the dtype of the embedding tables and their Adam moments on a backend."""
    return config.embedding_dtype or compute_dtype(config, backend)


def data_workers(config: FrozenConfigDict, backend: str, devices: int) -> int:
    """Processes that read and tokenize on a host with `devices` devices of a backend.

    On an accelerator at least one: a thread that tokenizes takes the interpreter from the thread
    that dispatches steps.
    """
    if config.data_workers is not None:
        return config.data_workers
    return 0 if backend == "cpu" else max(1, min(devices, (os.cpu_count() or 1) // 4))


def compiler_options(config: FrozenConfigDict, backend: str) -> dict[str, bool | int | str]:
    """The XLA flags of the groups that config.xla_flags names, for jax.jit's compiler_options.

    backend: tpu, gpu or cpu; groups of other backends are ignored.
    """
    groups = {name: (target, flags) for name, target, *flags in config.xla_flag_groups}
    options: dict[str, bool | int | str] = {}
    for name in config.xla_flags:
        target, flags = groups[name]
        if target == backend:
            options |= dict(map(_parse_flag, flags))
    return options


def _parse_flag(flag: str) -> tuple[str, bool | int | str]:
    """`name=value` -> (name, value as bool, int or str)."""
    name, _, text = flag.partition("=")
    if text in ("true", "false"):
        return name, text == "true"
    return name, int(text) if re.fullmatch(r"-?\d+", text) else text
