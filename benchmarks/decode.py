"""Speed of the engine.

Prefill throughput, time to first token, time per token, throughput by batch size, and the first
token of a conversation's second turn with and without the prefix cache, by turns.

    .venv/bin/python benchmarks/decode.py configs/base.yml model=d24
    .venv/bin/python benchmarks/decode.py configs/base.yml model=d4 max_target_length=512 vocab_size=4096

Weights are those of the run if run_name has a checkpoint, else random; decoding is greedy.
Utilization is of the chip's memory bandwidth and peak FLOP/s: a decode step reads the weight
matrices and the KV cache, and FLOPs are the model's. For a model that is too large for the CPU of a
machine without accelerators, it prints train_compile.py's estimate for compile_topology. With a
nanochat checkout in NANOCHAT and a Python with its packages in NANOCHAT_PYTHON, nanochat's engine
generates from the same weights and prompt in the same run, by turns. The last line is JSON.
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
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from benchmarks import common
from MaxNano import pyconfig, train_compile
from MaxNano.distributed import hardware, runtime
from MaxNano.inference.engine import Engine
from MaxNano.inference.programs import EnginePrograms, ModelRunner, decode_costs
from MaxNano.inference.requests import Request
from MaxNano.interop import nanochat
from MaxNano.models.setup import ModelSetup, set_up_model
from MaxNano.storage.files import run_directory
from MaxNano.training.loading import load_params

BATCHES = (1, 8, 32, 128)
NANOCHAT_BATCHES = (1, 16)
TURNS = 5
LARGEST_CPU_MODEL = 3e8  # parameters; about 1 token/s on a few cores


def random_params(target: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Parameters with which greedy answers are not one repeated token."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        return values / math.sqrt(leaf.shape[-2]) if leaf.ndim > 2 else 0.3 * values

    return jax.tree.map(draw, target) | {
        "resid_lambdas": np.ones(target["resid_lambdas"].shape, np.float32)
    }


def time_prefill(programs: EnginePrograms, params, length: int) -> float:
    """Median seconds of a prefill call with prompts of `length` tokens on every device."""
    rng = np.random.default_rng(0)
    runner, rows = ModelRunner(programs), programs.prefill_size
    runner.set_params(params)
    vocab_size = programs.setup.config.vocab_size
    tokens = rng.integers(0, vocab_size, (rows, length + 1), dtype=np.int32)
    lengths = np.full(rows, length, np.int32)
    copies = np.zeros((rows // programs.prefill_rows, programs.slots_per_shard + 1, 2), np.int32)
    copies[:, -1] = 1
    seconds = []
    for _ in range(1 + TURNS):
        begin = time.perf_counter()
        runner.prefill((tokens, lengths, copies), is_scored=False, with_top=False)
        jax.block_until_ready(runner.cache)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def time_generation(engine: Engine, request: Request) -> tuple[float, float]:
    """Seconds of the whole answer, and of its first token alone."""
    seconds = []
    for timed in (request, replace(request, max_tokens=1)):
        begin = time.perf_counter()
        engine.generate([timed])
        seconds.append(time.perf_counter() - begin)
    return tuple(seconds)


def measure(setup: ModelSetup, params, batch: int) -> common.Row:
    """The engine with `batch` slots, all in use."""
    config, mesh = setup.config, setup.mesh
    engine = Engine(setup, params, None, slots=batch)
    programs = engine.programs
    prompt, new = lengths_of(engine.max_length)
    request = Request(
        prompt=prompt_of(config, prompt), max_tokens=new, samples=batch, temperature=0
    )
    seconds = [time_generation(engine, request) for _ in range(1 + TURNS)][1:]
    whole, first = (statistics.median(column) for column in zip(*seconds, strict=True))
    token_seconds = (whole - first) / (new - 1)
    read_bytes, flops = decode_costs(programs, prompt + new // 2)
    row = {
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "first token ms": 1e3 * first,
        "ms per token": 1e3 * token_seconds,
        "tokens/s": batch / token_seconds,
        "GB/s": read_bytes / token_seconds / 1e9,
        "GFLOP/s": flops / token_seconds / 1e9,
    }
    chip = hardware.chip(mesh.devices.flat[0])
    if chip:
        row["bandwidth"] = read_bytes / token_seconds / chip.memory_bandwidth
        row["MFU"] = flops / token_seconds / (chip.peak_flops * mesh.size)
    if batch == BATCHES[0]:
        longest = programs.buckets[-1]
        seconds = time_prefill(programs, params, longest)
        row["prefill tokens/s"] = programs.prefill_size * longest / seconds
    return row


def measure_second_turn(setup: ModelSetup, params) -> common.Row:
    """Milliseconds to the first token after a long first turn, an answer and a short question."""
    config = setup.config
    engine = Engine(setup, params, None, slots=1, prefix_entries=2)
    earlier = engine.max_length * 3 // 4
    answer = question = min(32, engine.max_length // 16)  # all three fit into the context
    first = Request(prompt=prompt_of(config, earlier), max_tokens=answer, temperature=0)
    milliseconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(1 + TURNS):
        tokens = {}
        for has_prefix, column in milliseconds.items():
            engine.prefix_cache.index.clear()
            [[completion]] = engine.generate([first])
            if not has_prefix:
                engine.prefix_cache.index.clear()
            prompt = (*first.prompt, *completion.tokens, *prompt_of(config, question))
            begin = time.perf_counter()
            [[completion]] = engine.generate([replace(first, prompt=prompt, max_tokens=1)])
            column.append(1e3 * (time.perf_counter() - begin))
            tokens[has_prefix] = completion.tokens
        if tokens[False] != tokens[True] and setup.numerics.dtype == "float32":
            raise ValueError("with the prefix cache the model continues with another token")
    without, cached = (statistics.median(column[1:]) for column in milliseconds.values())
    return {
        "earlier tokens": earlier + answer,
        "new": question,
        "first token ms": cached,
        "without prefix cache": without,
        "share": cached / without,
    }


def lengths_of(max_length: int) -> tuple[int, int]:
    """Tokens of the prompt and of the answer."""
    return min(128, max_length // 4), min(128, max_length // 2)


def prompt_of(config: FrozenConfigDict, length: int) -> tuple[int, ...]:
    """The prompt."""
    return tuple(np.random.default_rng(1).integers(0, config.vocab_size, length).tolist())


# ---- Comparison with nanochat -------------------------------------------------------------------


@contextlib.contextmanager
def start_nanochat(config: FrozenConfigDict, params) -> Iterator[Callable[..., Any] | None]:
    """A function that runs nanochat and returns (seconds, tokens of the first row).

    None without NANOCHAT.
    """
    if not os.environ.get("NANOCHAT"):
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        np.savez(weights, **nanochat.from_params(params, config))
        task = {"weights": str(weights), "model": common.nanochat_model(config)}
        with common.start_nanochat("nanochat_decode.py", task) as ask:
            yield lambda **values: ask(values)


def compare(setup: ModelSetup, params) -> list[common.Row]:
    """Whole answers, prefill included, here and in nanochat by turns.

    An empty list without nanochat.

    In float32 both must generate the same tokens. In 16 bits they round differently: the table
    counts the tokens before the first difference.
    """
    config, rows = setup.config, []
    with start_nanochat(config, params) as nanochat:
        for batch in NANOCHAT_BATCHES if nanochat else ():
            engine = Engine(setup, params, None, slots=batch)
            prompt, new = lengths_of(engine.max_length)
            request = Request(
                prompt=prompt_of(config, prompt), max_tokens=new, samples=batch, temperature=0
            )
            ours, theirs = [], []
            for _ in range(1 + TURNS):
                begin = time.perf_counter()
                [completions] = engine.generate([request])
                ours.append(time.perf_counter() - begin)
                seconds, tokens = nanochat(prompt=request.prompt, samples=batch, max_tokens=new)
                theirs.append(seconds)
                same = min(_same_tokens(completion.tokens, tokens) for completion in completions)
                if same < new and setup.numerics.dtype == "float32":
                    raise ValueError(f"nanochat generates other tokens from token {same} on")
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
    """Length of the common prefix."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
    return len(list(pairs))


def main(config: FrozenConfigDict) -> int | None:
    """Measure every batch size, then compare with nanochat."""
    runtime.initialize(config)
    setup = set_up_model(config)
    parameters = sum(x.size for x in jax.tree.leaves(setup.params))
    if jax.default_backend() == "cpu" and parameters > LARGEST_CPU_MODEL:
        chips = config.compile_topology
        print(f"ESTIMATED for {chips}, not measured: no accelerator on this machine", flush=True)
        return train_compile.main(
            pyconfig.replace(config, "cli", compile_programs=("prefill", "decode"))
        )
    run = run_directory(config)
    has_run = (run / "checkpoints").exists()
    params = load_params(setup)[0] if has_run else random_params(setup.params, config.seed)
    print(f"weights: {run if has_run else 'random'}", flush=True)
    rows: list[common.Row] = []
    report: dict[str, Any] = {
        "model": config.model,
        "device": setup.mesh.devices.flat[0].device_kind,
        "devices": setup.mesh.size,
        "rows": rows,
    }
    for batch in BATCHES:
        rows.append(measure(setup, params, batch))
        print(json.dumps(report), flush=True)  # a result, should a later part not finish
    common.show(rows, digits=2)
    report["second turn"] = measure_second_turn(setup, params)
    common.show([report["second turn"]], digits=2)
    print(json.dumps(report), flush=True)
    report["nanochat"] = compare(setup, params)
    if report["nanochat"]:
        common.show(report["nanochat"], digits=2)
    print(json.dumps(report))
    return None


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
