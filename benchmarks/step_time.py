"""Time of the train step alone, on random tokens: no data, no logging.

    python benchmarks/step_time.py configs/base.yml model=d4 max_target_length=512 vocab_size=4096 \
        global_batch_tokens=8192

Prints the first step (with its compilation), then each step, then median and best, as tokens/s and, where the chip
is known, MFU.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, runtime, sharding, train, train_state
from MaxNano.data.loader import put_global

STEPS = 8


def main(config: FrozenConfigDict) -> None:
    """Time STEPS steps of a config."""
    runtime.initialize(config)
    setup = train.set_up(config)
    train.check_memory(setup)
    rng = np.random.default_rng(config.seed)
    rows = (setup.plan.rows, config.max_target_length + 1)
    tokens = rng.integers(0, config.vocab_size, rows, dtype=np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones(tokens[:, 1:].shape, np.float32),
    }
    with jax.set_mesh(setup.mesh):
        batch = put_global(batch, sharding.batch_sharding(setup.mesh, config.logical_axis_rules))
        programs = train.build_programs(setup, np.ones(config.vocab_size, np.int32))
        state = train_state.initialize(config, setup.numerics, setup.optimizer, setup.abstract)
        seconds = []
        for step in range(STEPS + 1):
            begin = time.perf_counter()
            state, metrics = programs.train(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - begin)
            print(f"step {step}: {seconds[-1]:.4f} s, loss {float(metrics['loss']):.5f}", flush=True)
    flops = train.flops_per_token(config)
    peak = runtime.peak_flops(list(setup.mesh.devices.flat))
    for name, value in (("median", statistics.median(seconds[1:])), ("best", min(seconds[1:]))):
        rate = config.global_batch_tokens / value
        mfu = f", MFU {rate * flops / peak:.1%}" if peak else ""
        print(f"{name}: {value:.4f} s, {rate:,.0f} tokens/s, {rate * flops / 1e9:,.1f} GFLOP/s{mfu}")


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
