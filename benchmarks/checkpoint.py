"""Times a checkpoint: how long training waits for a save, and how long until it is on the disk.

    .venv/bin/python benchmarks/checkpoint.py configs/base.yml model=d12 base_output_directory=/mnt/disk

The state has the config's shapes and random values, which no disk can compress. It is written to a
new folder in base_output_directory, and removed.
"""

import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # reports a typo before JAX is imported

from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.console import print_table
from MaxNano.distributed import runtime
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.setup import set_up

SAVES = 3
INTERVAL_SECONDS = 600  # for the share of training


def random_state(abstract: Any) -> Any:
    """Random values in the shapes, dtypes and shardings of a pytree."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    return jax.tree.map(fill, abstract)


def measure(config: FrozenConfigDict, folder: Path) -> dict[str, float]:
    """Medians in seconds: waiting of the training loop, until a checkpoint counts, restoring."""
    setup = set_up(config)
    state = jax.block_until_ready(random_state(setup.abstract))
    seconds: dict[str, list[float]] = {"training waits": [], "on the disk": [], "restored": []}
    with Checkpointer(config, folder) as checkpointer:
        for step in range(1, SAVES + 1):
            start = time.monotonic()
            checkpointer.save(step, state, {})
            seconds["training waits"].append(time.monotonic() - start)
            checkpointer.wait()
            seconds["on the disk"].append(time.monotonic() - start)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        del state
        start = time.monotonic()
        jax.block_until_ready(checkpointer.restore(setup.abstract)[0])
        seconds["restored"].append(time.monotonic() - start)
    return {"GB": size / 1e9, **{name: float(np.median(row)) for name, row in seconds.items()}}


def main(config: FrozenConfigDict) -> int:
    """Measure and print."""
    runtime.initialize(config)
    runs = Path(config.base_output_directory).expanduser()
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=runs) as folder:
        row = measure(config, Path(folder))
    row["% of ten minutes"] = 100 * row["training waits"] / INTERVAL_SECONDS
    title = f"checkpoints of {config.model} on {jax.device_count()} x {jax.devices()[0].device_kind}, seconds"
    print_table(title, list(row), [[f"{value:.2f}" for value in row.values()]])
    return 0


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
