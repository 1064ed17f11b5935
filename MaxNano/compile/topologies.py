"""TPU slices and GPUs by name, as devices to compile for on a machine without them."""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from MaxNano.distributed import gpus

# libtpu does not look for a TPU near this machine, shares the machine with other processes, and
# prints nothing.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v6e-8",  # any known type: the topology decides the slice
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


class Generation(NamedTuple):
    """The slices of a TPU generation."""

    axes: int  # of the network between chips
    cores: int  # TensorCores per chip, which the names count
    largest: int  # chips of the largest slice
    megacore: bool = True  # several cores of a chip are one device


GENERATIONS = {
    "v4": Generation(axes=3, cores=2, largest=2048),
    "v5p": Generation(axes=3, cores=2, largest=4096),
    "v5e": Generation(axes=2, cores=1, largest=256),
    "v6e": Generation(axes=2, cores=1, largest=256),
    "tpu7x": Generation(axes=3, cores=2, largest=2048, megacore=False),
}


def slice_shape(name: str) -> tuple[str, tuple[int, ...]]:
    """(generation, chips along each axis) of a slice by its Cloud TPU name, such as v6e-8.

    Raises ValueError for an unknown name.
    Source: https://cloud.google.com/tpu/docs/v6e and the pages of the other generations.
    """
    kind, _, size = name.partition("-")
    generation = GENERATIONS.get(kind)
    if generation and size.isdecimal():
        chips, rest = divmod(int(size), generation.cores)
        doublings = chips.bit_length() - 1
        smallest = (1, 4) if generation.axes == 2 else (4,)
        known = chips in smallest or 8 <= chips <= generation.largest
        if not rest and chips == 2**doublings and known:
            if generation.axes == 3 and chips == 4:
                return kind, (2, 2, 1)
            return kind, tuple(
                2 ** ((doublings + axis) // generation.axes) for axis in range(generation.axes)
            )
    raise ValueError(
        f"compile_topology={name} is no TPU slice: choose a generation of {', '.join(GENERATIONS)} and a power of two, "
        "such as v6e-8, v5e-16, v5p-8 or v4-32 (names of v4, v5p and tpu7x count two cores per chip, from 8 on)"
    )


def topology_devices(name: str, num_slices: int = 1) -> list[Any]:
    """The devices of GPUs or of `num_slices` TPU slices, for a mesh to compile for.

    Raises ValueError if there is no such topology, or if its compiler is not installed.
    """
    if name in gpus.topology_names():
        if num_slices > 1:
            raise ValueError(
                f"compile_num_slices={num_slices} is for TPU slices, and compile_topology={name} is not one: leave it 1"
            )
        return gpu_devices(name)
    try:
        return slice_devices(name, num_slices)
    except ValueError as error:
        raise ValueError(f"{error}; GPUs are {', '.join(gpus.topology_names())}") from error


def slice_devices(name: str, num_slices: int = 1) -> list[Any]:
    """The devices of `num_slices` slices, for a mesh to compile for.

    Sets libtpu's environment variables, which libtpu reads at the first call. On a machine without
    a TPU, JAX_PLATFORMS=cpu must be set before JAX is imported. Raises ValueError if there is no
    such slice, or if libtpu is not installed.
    """
    kind, shape = slice_shape(name)
    for variable, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if kind in ("v5e", "v6e"):
        host = shape if math.prod(shape) <= 8 else (2, 2)
    else:
        host = (2, 2, 1)
    options = {"chips_per_host_bounds": (*host, *(1 for _ in range(3 - len(host))))}
    if GENERATIONS[kind].cores > 1 and GENERATIONS[kind].megacore:
        options["chip_config_name"] = "megacore"  # a chip's two cores as one device
    if num_slices > 1:
        options["num_slices"] = num_slices
    topology = f"{kind}:{'x'.join(map(str, shape))}"
    try:
        return list(
            topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"topology {topology} is not available ({reason}): install libtpu with pip install 'jax[tpu]'"
        ) from error


# ---- GPUs ---------------------------------------------------------------------------------------


def gpu_devices(name: str) -> list[Any]:
    """The NVIDIA GPUs of a name of gpus.topology_names(), for a mesh to compile for.

    On a machine without a GPU, JAX_PLATFORMS=cpu must be set before JAX is imported. Raises
    ValueError if JAX's plugin for CUDA is not installed.
    """
    kind, _, count = name.rpartition("-")
    target = gpus.target_text(gpus.GPUS[kind])
    try:
        with cuda_without_gpu():
            # Slices x hosts x GPUs of a host.
            return list(
                topologies.get_topology_desc(
                    platform="cuda", topology=f"1x1x{count}", target_config=target
                ).devices
            )
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"compile_topology={name} needs JAX's plugin for CUDA ({reason}): install the extra gpu with "
            "DEVICE=gpu bash setup.sh"
        ) from error


@contextlib.contextmanager
def cuda_without_gpu() -> Iterator[None]:
    """Within it, JAX lowers for "gpu" on a machine without a GPU, and takes it for CUDA.

    JAX asks its backends whether "gpu" means cuda, rocm or oneapi, and raises RuntimeError if no GPU
    is there, although lowering needs only the name. This replaces the function that asks, inside of
    JAX, by one that answers "cuda" where it would raise, and puts it back at the end. Raises
    ValueError if this JAX does not have the function.
    """
    from jax._src import xla_bridge

    asked = getattr(xla_bridge, "canonicalize_platform", None)
    if asked is None:
        raise ValueError(
            f"jax {jax.__version__} cannot compile for a GPU that is not there: it has no "
            "xla_bridge.canonicalize_platform; take jax 0.10 to 0.12"
        )

    def canonicalize_platform(platform: str) -> str:
        try:
            return asked(platform)
        except RuntimeError:
            if platform != "gpu":
                raise
            return "cuda"

    xla_bridge.canonicalize_platform = canonicalize_platform
    try:
        yield
    finally:
        xla_bridge.canonicalize_platform = asked
