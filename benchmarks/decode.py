"""Speed of the engine: prefill tokens/s, time to the first token, time a token, tokens/s by batch.

    python benchmarks/decode.py configs/base.yml model=d24
    python benchmarks/decode.py configs/base.yml model=d4 max_target_length=512 vocab_size=4096 num_cpu_devices=1

Weights are the run's, where run_name has a checkpoint, else random; tokens are greedy. Utilization is of the chip's
memory bandwidth and FLOP/s, where the chip is known: bytes are the matrices and the cached keys and values that a step
has to read, FLOPs those of the model. Where decoding is too much for the CPU and there is nothing else, it prints what
train_compile.py says of compile_topology instead: an estimate, nothing is run. With a nanochat checkout in NANOCHAT and
a Python that has its packages in NANOCHAT_PYTHON, its engine generates from the same weights and the same prompt in the
same run, turn by turn. Ends with a JSON line.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()

import contextlib
import itertools
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from benchmarks import common
from MaxNano import convert, pyconfig, train_compile
from MaxNano.distributed import hardware, runtime
from MaxNano.distributed.mesh import make_mesh
from MaxNano.inference import engine
from MaxNano.inference.engine import Engine, Request
from MaxNano.models.setup import numerics_of, set_up_model
from MaxNano.storage import files
from MaxNano.training.loading import load_params

BATCHES = (1, 8, 32, 128)
NANOCHAT_BATCHES = (1, 16)
TURNS = 5
LARGEST_CPU_MODEL = 3e8  # parameters: a token a second on a few cores


def random_params(target: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Parameters of a model whose answers are not all the same token."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        return values / math.sqrt(leaf.shape[-2]) if leaf.ndim > 2 else 0.3 * values

    return jax.tree.map(draw, target) | {
        "resid_lambdas": np.ones(target["resid_lambdas"].shape, np.float32)
    }


def time_prefill(programs: engine.Programs, weights, length: int) -> float:
    """Median seconds of a call of the prefill program with prompts of `length` tokens on every device."""
    rng = np.random.default_rng(0)
    rows = programs.rows * programs.ways
    tokens = rng.integers(0, programs.config.vocab_size, (rows, length + 1), dtype=np.int32)
    lengths = np.full(rows, length, np.int32)
    copies = np.zeros((programs.ways, programs.slots // programs.ways + 1, 2), np.int32)
    copies[:, -1] = 1
    arrays = [jax.device_put(x, programs.by_slot) for x in (tokens, lengths, copies)]
    cache, seconds = programs.empty_cache(), []
    for _ in range(1 + TURNS):
        begin = time.perf_counter()
        cache, _ = jax.block_until_ready(
            programs.prefill(False)(weights, cache, *arrays, np.bool_(False))
        )
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def time_generation(served: Engine, request: Request) -> tuple[float, float]:
    """Seconds of the whole answer, and of one that ends with its first token."""
    seconds = []
    for own in (request, replace(request, max_tokens=1)):
        begin = time.perf_counter()
        served.generate([own])
        seconds.append(time.perf_counter() - begin)
    return tuple(seconds)


def measure(config: FrozenConfigDict, params, mesh: jax.sharding.Mesh, batch: int) -> common.Row:
    """The engine with `batch` slots, all in use."""
    served = Engine(config, mesh, params, None, slots=batch)
    programs = served.programs
    prompt, new = lengths_of(served.max_length)
    request = Request(
        prompt=prompt_of(config, prompt), max_tokens=new, samples=batch, temperature=0
    )
    found = [time_generation(served, request) for _ in range(1 + TURNS)][1:]
    whole, first = (statistics.median(column) for column in zip(*found, strict=True))
    a_token = (whole - first) / (new - 1)
    size, flops = programs.decode_costs(prompt + new // 2)
    row = {
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "first token ms": 1e3 * first,
        "ms a token": 1e3 * a_token,
        "tokens/s": batch / a_token,
        "GB/s": size / a_token / 1e9,
        "GFLOP/s": flops / a_token / 1e9,
    }
    chip = hardware.chip(mesh.devices.flat[0])
    if chip:
        row["bandwidth"] = size / a_token / chip.memory_bandwidth
        row["MFU"] = flops / a_token / (chip.peak_flops * mesh.size)
    if batch == BATCHES[0]:
        longest = programs.buckets[-1]
        rows = programs.rows * programs.ways
        row["prefill tokens/s"] = rows * longest / time_prefill(programs, served._weights, longest)
    return row


def lengths_of(max_length: int) -> tuple[int, int]:
    """Tokens of the prompt and of the answer."""
    return min(128, max_length // 4), min(128, max_length // 2)


def prompt_of(config: FrozenConfigDict, length: int) -> tuple[int, ...]:
    """The prompt."""
    return tuple(np.random.default_rng(1).integers(0, config.vocab_size, length).tolist())


# ---- nanochat beside it ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def start_nanochat(config: FrozenConfigDict, params) -> Iterator[Callable[..., Any] | None]:
    """A function that lets nanochat generate and returns (seconds, tokens of the first row); None if not asked for."""
    checkout = os.environ.get("NANOCHAT")
    if not checkout:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        np.savez(weights, **convert.params_to_nanochat(params, config))
        task = {"weights": str(weights), "model": common.nanochat_model(config)}
        program = Path(__file__).with_name("nanochat_decode.py")
        with subprocess.Popen(
            [os.environ.get("NANOCHAT_PYTHON", sys.executable), str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=common.nanochat_environment(checkout),
        ) as process:

            def ask(task: dict):
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
                while answer and answer[0] not in '["':
                    answer = process.stdout.readline()  # what nanochat itself prints
                if not answer:
                    raise ValueError("nanochat's side failed; its error stands above")
                return json.loads(answer)

            print("nanochat:", ask(task), flush=True)
            yield lambda **values: ask(values)
            process.stdin.close()


def compare(config: FrozenConfigDict, params, mesh: jax.sharding.Mesh) -> list[common.Row]:
    """The whole of an answer, prefill included, here and in nanochat, by turns; nothing without nanochat.

    In float32 both must give the same tokens. In 16 bits they round differently, so that after some tokens, which the
    table counts, another one is the likeliest.
    """
    rows = []
    dtype = numerics_of(config, mesh).dtype
    with start_nanochat(config, params) as nanochat:
        for batch in NANOCHAT_BATCHES if nanochat else ():
            served = Engine(config, mesh, params, None, slots=batch)
            prompt, new = lengths_of(served.max_length)
            request = Request(
                prompt=prompt_of(config, prompt), max_tokens=new, samples=batch, temperature=0
            )
            ours, theirs = [], []
            for _ in range(1 + TURNS):
                begin = time.perf_counter()
                [completions] = served.generate([request])
                ours.append(time.perf_counter() - begin)
                seconds, tokens = nanochat(prompt=request.prompt, samples=batch, max_tokens=new)
                theirs.append(seconds)
                same = min(_same_tokens(completion.tokens, tokens) for completion in completions)
                if same < new and dtype == "float32":
                    raise ValueError(f"nanochat says other tokens from number {same} on")
            ours, theirs = (statistics.median(seconds[1:]) for seconds in (ours, theirs))
            rows.append(
                {
                    "batch": batch,
                    "prompt": prompt,
                    "new": new,
                    "MaxNano tokens/s": batch * new / ours,
                    "nanochat tokens/s": batch * new / theirs,
                    "times": theirs / ours,
                    "same tokens": same,
                }
            )
    return rows


def _same_tokens(ours: list[int], theirs: list[int]) -> int:
    """How many tokens are the same from the first on."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
    return len(list(pairs))


def main(config: FrozenConfigDict) -> int | None:
    """Measure every batch, then compare."""
    runtime.initialize(config)
    mesh = make_mesh(config)
    target = set_up_model(config, mesh=mesh).params
    if (
        jax.default_backend() == "cpu"
        and sum(x.size for x in jax.tree.leaves(target)) > LARGEST_CPU_MODEL
    ):
        print(
            f"ESTIMATED for {config.compile_topology}, not measured: this machine has no accelerator",
            flush=True,
        )
        return train_compile.main(
            pyconfig.replace(config, "cli", compile_programs=("prefill", "decode"))
        )
    run = files.run_directory(config)
    has_run = (run / "checkpoints").exists()
    params = load_params(config, mesh)[0] if has_run else random_params(target, config.seed)
    print(f"weights: {run if has_run else 'random'}", flush=True)
    rows = [measure(config, params, mesh, batch) for batch in BATCHES]
    common.show(rows, digits=2)
    beside = compare(config, params, mesh)
    if beside:
        common.show(beside, digits=2)
    device = mesh.devices.flat[0].device_kind
    print(
        json.dumps(
            {
                "model": config.model,
                "device": device,
                "devices": mesh.size,
                "rows": rows,
                "nanochat": beside,
            }
        )
    )
    return None


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
