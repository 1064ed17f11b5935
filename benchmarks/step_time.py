"""Time of the train step alone, on random tokens: no data, no logging.

    python benchmarks/step_time.py configs/base.yml model=d4 max_target_length=512 vocab_size=4096 \
        global_batch_tokens=8192

Prints median and best step as tokens/s and, where the chip is known, MFU. With a nanochat checkout in NANOCHAT and
a Python that has its packages in NANOCHAT_PYTHON, its compiled model and optimizer take the same steps in the same
run, turn by turn, and the ratio of the medians is printed.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, runtime, sharding, train, train_state
from MaxNano.data.loader import put_global, to_batch

TURNS = 6
STEPS_A_TURN = 4


def prepare(config: FrozenConfigDict, setup: train.Setup) -> Callable[[], float]:
    """A function that takes one step and returns its seconds. To be called inside the mesh."""
    rng = np.random.default_rng(config.seed)
    shape = (setup.plan.rows, config.max_target_length + 1)
    batch = to_batch(rng.integers(0, config.vocab_size, shape, dtype=np.int32))
    batch = put_global(batch, sharding.batch_sharding(setup.mesh, config.logical_axis_rules))
    programs = train.build_programs(setup, train.jit_train(setup), np.ones(config.vocab_size, np.int32))
    state = train_state.initialize(config, setup.numerics, setup.optimizer, setup.abstract)

    def step() -> float:
        nonlocal state
        begin = time.perf_counter()
        state, metrics = programs.train(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - begin

    return step


@contextlib.contextmanager
def start_nanochat(config: FrozenConfigDict) -> Iterator[Callable[[int], list[float]] | None]:
    """A function that lets nanochat take steps and returns their seconds; None where it is not asked for."""
    checkout = os.environ.get("NANOCHAT")
    if not checkout:
        yield None
        return
    task = {
        "rows": config.global_batch_tokens // config.max_target_length,
        "model": {
            "sequence_len": config.max_target_length,
            "vocab_size": config.vocab_size,
            "n_layer": config.num_decoder_layers,
            "n_head": config.num_query_heads,
            "n_kv_head": config.num_kv_heads,
            "n_embd": config.emb_dim,
            "window_pattern": config.window_pattern,
        },
    }
    program = Path(__file__).with_name("nanochat_step_time.py")
    with subprocess.Popen(
        [os.environ.get("NANOCHAT_PYTHON", "python3"), str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": checkout},
    ) as process:

        def ask(line: str):
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            while answer and answer[0] not in '["':
                answer = process.stdout.readline()  # what nanochat itself prints
            if not answer:
                raise ValueError("nanochat's side failed; its error stands above")
            return json.loads(answer)

        print("nanochat:", ask(json.dumps(task)), flush=True)
        yield lambda steps: ask(str(steps))
        process.stdin.close()


def main(config: FrozenConfigDict) -> None:
    """Take TURNS turns of STEPS_A_TURN steps each."""
    runtime.initialize(config)
    setup = train.set_up(config)
    train.check_memory(setup)
    with start_nanochat(config) as nanochat, jax.set_mesh(setup.mesh):
        step = prepare(config, setup)
        print(f"first step, with compilation: {step():.1f} s, on {setup.mesh.size} devices", flush=True)
        ours, theirs = [], []
        for _ in range(TURNS):
            ours += [step() for _ in range(STEPS_A_TURN)]
            theirs += nanochat(STEPS_A_TURN) if nanochat else []
    median = statistics.median(ours)
    flops = train.flops_per_token(config)
    peak = runtime.peak_flops(list(setup.mesh.devices.flat))
    for name, seconds in (("median", median), ("best", min(ours))):
        rate = config.global_batch_tokens / seconds
        mfu = f", MFU {rate * flops / peak:.1%}" if peak else ""
        print(f"{name}: {seconds:.4f} s, {rate:,.0f} tokens/s, {rate * flops / 1e9:,.1f} GFLOP/s{mfu}")
    if theirs:
        other = statistics.median(theirs)
        rate = config.global_batch_tokens / other
        print(f"nanochat, median: {other:.4f} s, {rate:,.0f} tokens/s; ours {other / median:.2f} times")


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
