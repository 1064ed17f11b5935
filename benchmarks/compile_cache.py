"""Compile time before the first train step, without and with the compilation cache in a bucket.

    .venv/bin/python benchmarks/compile_cache.py configs/base.yml model=d6 max_target_length=512 global_batch_tokens=512

Each machine is a process with an empty home; the bucket is the tests' object store on loopback,
which answers after LATENCY_SECONDS and carries BYTES_PER_SECOND. Prints a row a machine and a JSON
line: seconds, and CPU seconds, in which the train step and the initial state are compiled or read
and the state is made; seconds of the first step and of the second; programs found in the cache and
not found; MB in the bucket.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence

import jax
from ml_collections import FrozenConfigDict

from benchmarks import common, step_time
from MaxNano import pyconfig
from MaxNano.distributed import compile_cache, runtime
from MaxNano.training.memory_plan import compile_train
from MaxNano.training.setup import set_up

LATENCY_SECONDS = 0.05
BYTES_PER_SECOND = 50e6
MACHINES = ("empty bucket", "next machine", "the one after", "no cache")


def measure(words: Sequence[str]) -> None:
    """Runs two steps with this command line; prints its times and cache hits as a JSON line."""
    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit("/", 1)[-1]))
    config = pyconfig.initialize(words)
    runtime.initialize(config)
    jax.devices()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    setup, program = compile_train(set_up(config))
    with jax.set_mesh(setup.mesh):
        step = step_time.prepare(setup, program)
        row = {"ready s": time.perf_counter() - begin, "CPU s": time.process_time() - cpu_begin}
        row |= {"first step s": step(), "second step s": step()}
    compile_cache.finish()
    print(
        json.dumps(
            row | {"found": events.count("cache_hits"), "not found": events.count("cache_misses")}
        )
    )


def main(config: FrozenConfigDict) -> int | None:
    """Runs one process per machine, one after the other."""
    sys.path.append(str(common.ROOT / "tests"))
    import object_store

    rows = []
    with object_store.serve() as store:
        store.slow(LATENCY_SECONDS, BYTES_PER_SECOND)
        for name in MACHINES:
            words = [*sys.argv[1:], f"base_output_directory={store.bucket}/runs"]
            words += ["jax_cache_dir="] if name == "no cache" else []
            with tempfile.TemporaryDirectory() as home:
                done = subprocess.run(
                    [
                        sys.executable,
                        "-c",
                        f"from benchmarks import compile_cache; compile_cache.measure({words!r})",
                    ],
                    env={**os.environ, **store.env, "HOME": home},
                    cwd=common.ROOT,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
            size = sum(map(len, store.objects().values())) / 1e6
            rows.append({"machine": name, **json.loads(done.stdout.splitlines()[-1]), "MB": size})
            print(rows[-1], flush=True)
    common.show(rows, digits=3)
    print(json.dumps({"model": config.model, "rows": rows}))
    return None


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
