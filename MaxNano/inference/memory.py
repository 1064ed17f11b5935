"""How much memory a model takes to generate text, before anything of it is loaded."""

import jax
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, scaling
from MaxNano.distributed import hardware


def check_memory(config: FrozenConfigDict) -> None:
    """Raise ValueError if a run's weights and KV cache exceed the free memory of a device."""
    devices = jax.local_devices()
    backend = devices[0].platform
    itemsize = 4 if hardware.compute_dtype(config, backend) == "float32" else 2
    length = config.decode_max_length or config.max_target_length
    positions = sum(min(window + 1, length) for window in pyconfig.windows_of(config))
    sequences = config.decode_slots + min(config.prefix_cache_entries, 2 * config.decode_slots)
    cache_bytes = 2 * sequences * positions * config.num_kv_heads * config.head_dim
    # The checkpoint's parameters in float32, and the weights that decoding reads.
    weight_bytes = scaling.parameter_counts(scaling.shape_of(config)).total * (4 + itemsize)
    if backend == "cpu":  # virtual devices share the weights
        needed, free = weight_bytes + cache_bytes * itemsize, hardware.host_memory_bytes()
    else:
        # The data-parallel axes share out the sequences, and only the tensor axis the weights.
        needed = weight_bytes / config.ici_tensor_parallelism
        needed += cache_bytes * itemsize / len(devices)
        stats = [device.memory_stats() or {} for device in devices]
        known = all("bytes_limit" in each for each in stats)
        free = min(each["bytes_limit"] - each["bytes_in_use"] for each in stats) if known else None
    if free is not None and needed > free:
        raise ValueError(
            f"{config.run_name} needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are"
            " free: lower decode_slots or decode_max_length, or serve fewer runs"
        )
