"""Checks a kernel on the device: its output and gradients against the reference, and its time.

The truth is the reference in float32 at the highest precision. A kernel may be ERROR_FACTOR times
as far from it as the reference in the run's dtype is, or LEAST_ERROR.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, scaling
from MaxNano.distributed import hardware
from MaxNano.models import attention, embedding, products
from MaxNano.models.layers import rotary_tables

ROWS = 2
CALLS = 5
LEAST_SECONDS = 0.5  # of what is timed
MOST_CALLS = 50
ERROR_FACTOR = 2.0
LEAST_ERROR = {"float32": 1e-5, "bfloat16": 5e-3}  # relative norms
TOKENS = 4096  # of the embedding gradient and of the layers' products


def timed(call: Callable[[], Any], calls: int) -> list[float]:
    """Seconds of each of `calls` calls, or of more that take LEAST_SECONDS, at most MOST_CALLS."""
    seconds: list[float] = []
    while len(seconds) < calls or (sum(seconds) < LEAST_SECONDS and len(seconds) < MOST_CALLS):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


def check(config: FrozenConfigDict) -> dict[str, Any]:
    """Check what the config chooses: its attention for every window of the model, its embedding
    gradient, and its layers' products.

    {"milliseconds": forward and backward pass of all layers, "error": the largest, relative to what
    is allowed: above 1 it is wrong, "problem": in words, "" if it is correct}.
    """
    backend = jax.default_backend()
    dtype = hardware.compute_dtype(config, backend)
    parts = [embedding_error(config, dtype)] if config.embedding_gradient != "auto" else []
    if config.layer_products != "auto":
        parts.append(products_error(config, dtype))
    milliseconds = 0.0
    if config.attention != "auto":
        windows = Counter(pyconfig.windows_of(config))
        for window, layers in windows.items():
            errors, seconds = attention_error(config, window, dtype)
            parts.append(errors)
            milliseconds += 1e3 * layers * seconds
    worst = max(
        ((name, error) for errors in parts for name, error in errors.items()),
        key=lambda pair: pair[1] if np.isfinite(pair[1]) else np.inf,
    )
    is_wrong = not worst[1] <= 1
    problem = f"{worst[0]} differs from the reference by {worst[1]:.1f} times the tolerance"
    return {
        "milliseconds": milliseconds,
        "error": float(np.nan_to_num(worst[1], nan=1e9, posinf=1e9)),
        "problem": problem if is_wrong else "",
    }


def excess(computed: Any, plain: Any, exact: Any, dtype: str) -> dict[str, float]:
    """{name: error relative to what is allowed} of arrays by name.

    plain: what the reference gives in the run's dtype; exact: in float32.
    """

    def error(values):
        difference = np.asarray(values, np.float64) - np.asarray(exact[name], np.float64)
        return np.linalg.norm(difference) / max(np.linalg.norm(exact[name]), 1e-30)

    errors = {}
    for name in exact:
        allowed = max(ERROR_FACTOR * error(plain[name]), LEAST_ERROR[dtype])
        errors[name] = error(computed[name]) / allowed
    return errors


def attention_error(
    config: FrozenConfigDict, window: int, dtype: str
) -> tuple[dict[str, float], float]:
    """(errors by array, seconds of a forward and backward pass) of the config's attention."""
    heads, length = attention.Heads.from_config(config), config.max_target_length
    rng = np.random.default_rng(window)
    columns = heads.kv_heads * heads.head_dim
    arrays = {
        "gradient of qkv": rng.standard_normal((ROWS, length, columns * (heads.group + 2))),
        "gradient of value embeddings": rng.standard_normal((ROWS, length, columns)),
        "gradient of gates": rng.uniform(0, 3, (ROWS, heads.kv_heads, length)),
    }
    weights = jnp.asarray(rng.standard_normal((ROWS, length, columns * heads.group)), jnp.float32)
    tables = rotary_tables(length, heads.head_dim, config.rope_theta)

    def passes(kernel: str) -> Callable[..., tuple]:
        def output(qkv, rows, gates):
            return attention.attend(
                qkv,
                tables,
                heads=heads,
                window=window,
                kernel=kernel,
                settings=attention.KernelSettings.from_config(config),
                rules=config.logical_axis_rules,
                value_embed=(rows, gates),
            )

        def forward_and_backward(qkv, rows, gates):
            out, pull = jax.vjp(output, qkv, rows, gates)
            return out, *pull(weights.astype(out.dtype))

        return jax.jit(forward_and_backward)

    def inputs(dtype: str) -> list[jax.Array]:
        qkv, rows, gates = arrays.values()
        return [jnp.asarray(qkv, dtype), jnp.asarray(rows, dtype), jnp.asarray(gates, jnp.float32)]

    def named(results) -> dict[str, np.ndarray]:
        names = (f"output (window {window})", *(f"{name} (window {window})" for name in arrays))
        return dict(zip(names, (np.asarray(x, np.float32) for x in results), strict=True))

    with jax.default_matmul_precision("highest"):
        exact = named(passes("reference")(*inputs("float32")))
    plain = named(passes("reference")(*inputs(dtype)))
    program, given = passes(config.attention), inputs(dtype)
    computed = named(program(*given))
    seconds = timed(lambda: jax.block_until_ready(program(*given)), CALLS)
    return excess(computed, plain, exact, dtype), statistics.median(seconds)


def products_error(config: FrozenConfigDict, dtype: str) -> dict[str, float]:
    """The errors of a layer's products as the config computes them, and of their gradients."""
    rng = np.random.default_rng(0)
    sizes = scaling.axis_sizes(scaling.shape_of(config))
    width, heads = config.emb_dim, sizes["heads"]
    mlp = {name: tuple(map(sizes.get, axes)) for name, axes in scaling.BLOCK["mlp"].items()}
    shapes = {"project": (width, heads + 2 * sizes["kv_heads"]), "out": (heads, width)} | mlp
    matrices = {n: rng.standard_normal(s, np.float32) * s[0] ** -0.5 for n, s in shapes.items()}
    tokens = {name: rng.standard_normal((TOKENS, width), np.float32) for name in ("x", "x0")}
    channels = config.value_embed_gate_channels

    def results(method: str, dtype: str) -> Mapping[str, np.ndarray]:
        chosen = products.by_name(method, config, jax.default_backend())

        def layer(arrays):
            scales = jnp.float32(0.9), jnp.float32(0.3)
            x, product, first = chosen.project(
                arrays["x"], arrays["x0"], scales, arrays["project"], channels
            )
            x = chosen.add_product(x, product[:, :heads], arrays["out"])
            return chosen.mlp(x, {name: arrays[name] for name in mlp}), product, first

        @jax.jit
        def run(arrays):
            out, pull = jax.vjp(layer, arrays)
            return out, pull(jax.tree.map(jnp.ones_like, out))[0]

        out, gradients = run({k: jnp.asarray(a, dtype) for k, a in (matrices | tokens).items()})
        named = dict(zip(("layer", "projection", "gate channels"), out, strict=True))
        named |= {f"gradient of {name}": array for name, array in gradients.items()}
        return {name: np.asarray(array, np.float32) for name, array in named.items() if array.size}

    with jax.default_matmul_precision("highest"):
        exact = results("xla", "float32")
    return excess(results(config.layer_products, dtype), results("xla", dtype), exact, dtype)


def embedding_error(config: FrozenConfigDict, dtype: str) -> dict[str, float]:
    """The error of the config's embedding gradient, for tokens with some frequent ones."""
    rng = np.random.default_rng(0)
    size = -(-config.vocab_size // config.vocab_multiple) * config.vocab_multiple
    tokens = jnp.asarray(rng.integers(0, size, TOKENS) // rng.integers(1, 64, TOKENS), jnp.int32)
    rows = rng.standard_normal((TOKENS, config.emb_dim), np.float32)
    interpret = jax.default_backend() != "tpu"

    def gradient(method: str, dtype: str) -> Mapping[str, np.ndarray]:
        ordered = embedding.order(tokens, method)
        total = embedding.table_gradient(jnp.asarray(rows, dtype), ordered, size, method, interpret)
        return {"embedding gradient": np.asarray(total.astype(dtype), np.float32)}

    exact = gradient("scatter", "float32")
    computed = gradient(config.embedding_gradient, dtype)
    return excess(computed, gradient("scatter", dtype), exact, dtype)
