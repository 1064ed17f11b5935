"""Attention: one signature, several kernels. To add one, write a function and give it a row in KERNELS.

Legend: B batch, L length, N heads, K kv_heads, G query heads a kv head, H head_dim.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, window: int, kernel: str, chunk: int
) -> jax.Array:
    """Causal attention in which position t sees keys t - window ... t, window + 1 of them.

    q (B, L, N, H); k, v (B, L, K, H), N a multiple of K -> (B, L, N, H) in q's dtype. Scores are scaled by
    1 / sqrt(H); softmax is in float32. `chunk` is the number of query rows a block, for the kernels that use blocks.
    Raises ValueError for a kernel that does not exist.
    """
    if kernel not in KERNELS:
        raise ValueError(f"attention={kernel} is unknown: choose one of {', '.join(KERNELS)}")
    return KERNELS[kernel](q, k, v, window, chunk)


def resolve(kernel: str, backend: str) -> str:
    """The kernel that attention=auto means on a JAX backend (cpu, gpu, tpu)."""
    if kernel != "auto":
        return kernel
    return "chunked" if backend == "cpu" else "reference"


def reference(q, k, v, window, chunk):
    """All scores at once, masked: the definition, right anywhere, and the one to test others against."""
    del chunk
    return _block(q, k, v, window, first_query=0, first_key=0)


def chunked(q, k, v, window, chunk):
    """Blocks of `chunk` queries, each against only the keys that it can see.

    The work falls from L x L to what causality and the window leave, rounded up to blocks.
    """
    length = q.shape[1]
    blocks = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        low = max(0, start - window)
        block = _block(
            q[:, start:stop], k[:, low:stop], v[:, low:stop], window, first_query=start, first_key=low
        )
        blocks.append(block)
    return jnp.concatenate(blocks, axis=1)


KERNELS: dict[str, Callable[..., jax.Array]] = {"reference": reference, "chunked": chunked}


def _block(q, k, v, window, *, first_query: int, first_key: int):
    """Queries at first_query ... against keys at first_key ...: one masked softmax."""
    batch, queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("BQKGH,BSKH->BKGQS", grouped, k, preferred_element_type=jnp.float32)
    position = first_query + jnp.arange(queries)[:, None]
    key_position = first_key + jnp.arange(k.shape[1])[None, :]
    visible = (key_position <= position) & (key_position >= position - window)
    scores = jnp.where(visible, scores * head_dim**-0.5, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKGQS,BSKH->BQKGH", probabilities, v)
    return out.reshape(q.shape)
