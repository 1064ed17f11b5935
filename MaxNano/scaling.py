"""Scaling laws: from depth to width, parameters, FLOPs, steps, batch size and learning rates.

Pure functions of plain numbers, so that pyconfig can derive a config without JAX.

Source: nanochat@92d63d4 (scripts/base_train.py, nanochat/gpt.py), which cites
https://arxiv.org/abs/2505.13738 for the batch size and https://arxiv.org/abs/2405.13698 for weight
decay.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

REFERENCE_DEPTH = 12  # depth at which learning rates, batch size and weight decay were tuned
REFERENCE_BATCH_TOKENS = 2**19
BATCH_EXPONENT = 0.383  # optimal batch size ~ training tokens ** BATCH_EXPONENT


# The matrices of a block: part -> name -> logical axes of its inputs and outputs. Parameters are
# declared, initialized, sharded and counted from this table, and FLOPs follow it. To change the
# MLP, change its row here and the function `mlp` in models/layers.py.
BLOCK: dict[str, dict[str, tuple[str, str]]] = {
    "attention": {
        "query": ("embed", "heads"),
        "key": ("embed", "kv_heads"),
        "value": ("embed", "kv_heads"),
        "out": ("heads", "embed"),
    },
    "mlp": {"wi": ("embed", "mlp"), "wo": ("mlp", "embed")},
}


# The config keys that define a model: with another value the same parameters are another model.
# Checkpoint identity, import and export read this list. Each key has the value that a checkpoint
# implies if it was saved before the key existed, so that older checkpoints still load.
# None: every checkpoint has the key.
ARCHITECTURE_KEYS: Mapping[str, Any] = {
    # Number and size of the parameters.
    "num_decoder_layers": None,
    "emb_dim": None,
    "mlp_dim": None,
    "num_query_heads": None,
    "num_kv_heads": None,
    "head_dim": None,
    "vocab_size": None,
    "vocab_multiple": None,
    "value_embed_gate_channels": None,
    "smear_gate_channels": None,
    "use_backout": None,
    # The computation.
    "rope_theta": None,
    "qk_norm_scale": None,
    "value_embed_gate_range": None,
    "norm_epsilon": None,
    "logits_soft_cap": None,
}

# Keys that a later stage may change for the same parameters: how far attention reaches.
# Exports carry them too.
CONTEXT_KEYS: Mapping[str, Any] = {
    "max_target_length": None,
    "window_pattern": None,
    "short_window_fraction": None,
    "short_window_multiple": None,
}


def architecture_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The ARCHITECTURE_KEYS of a config, which any version may have saved.

    Raises ValueError that names a key which is missing although every version has it.
    """
    architecture = {key: values.get(key, implied) for key, implied in ARCHITECTURE_KEYS.items()}
    for key, value in architecture.items():
        if value is None:
            raise ValueError(f"the saved config has no {key}, which defines the model")
    return architecture


class Shape(NamedTuple):
    """The ARCHITECTURE_KEYS that decide the number and size of a model's parameters."""

    num_decoder_layers: int
    emb_dim: int
    mlp_dim: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    vocab_multiple: int
    value_embed_gate_channels: int
    smear_gate_channels: int
    use_backout: bool


class Counts(NamedTuple):
    """Number of parameters by kind. `matrices` are all weights of the layers and the value gates."""

    token_embed: int
    value_embeds: int
    lm_head: int
    matrices: int
    scalars: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self)

    @property
    def scaling(self) -> int:
        """The parameters that the scaling laws count: those in a matrix product with every token."""
        return self.matrices + self.lm_head


def shape_of(values: Mapping[str, Any]) -> Shape:
    """The Shape in a config, which any version may have saved."""
    architecture = architecture_of(values)
    return Shape(*(architecture[key] for key in Shape._fields))


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def width(depth: int, aspect_ratio: int, head_dim: int) -> int:
    """emb_dim of a model of `depth` layers."""
    return round_up(depth * aspect_ratio, head_dim)


def reference_shape(shape: Shape, aspect_ratio: int) -> Shape:
    """The depth-12 model of the same family: same head_dim, vocabulary, options and proportions."""
    emb_dim = width(REFERENCE_DEPTH, aspect_ratio, shape.head_dim)
    heads = emb_dim // shape.head_dim
    return shape._replace(
        num_decoder_layers=REFERENCE_DEPTH,
        emb_dim=emb_dim,
        mlp_dim=max(1, emb_dim * shape.mlp_dim // shape.emb_dim),
        num_query_heads=heads,
        num_kv_heads=max(1, heads * shape.num_kv_heads // shape.num_query_heads),
    )


def value_embed_layers(num_layers: int, gate_channels: int) -> tuple[int, ...]:
    """Layers with value embeddings: every second layer, the last included; none without a gate."""
    return tuple(range((num_layers - 1) % 2, num_layers, 2)) if gate_channels else ()


def window_sizes(
    num_layers: int, pattern: str, length: int, fraction: float, multiple: int
) -> tuple[int, ...]:
    """Attention window of each layer in tokens; a window w has w + 1 keys, the query's included.

    `pattern` is tiled over the layers: S is `fraction` of `length` rounded up to `multiple` and at
    most `length`, L is `length`. The last layer always has `length`.
    """
    # The inner round removes the float error of quotients such as 0.1 * 1280 / 128.
    short = min(length, multiple * math.ceil(round(length * fraction / multiple, 9)))
    windows = [short if pattern[i % len(pattern)] == "S" else length for i in range(num_layers)]
    return (*windows[:-1], length)


def axis_sizes(shape: Shape) -> dict[str, int]:
    """The size of each logical axis that a matrix of the block can have."""
    return {
        "embed": shape.emb_dim,
        "heads": shape.num_query_heads * shape.head_dim,
        "kv_heads": shape.num_kv_heads * shape.head_dim,
        "mlp": shape.mlp_dim,
    }


def block_matrices(shape: Shape) -> dict[tuple[str, str], tuple[int, int]]:
    """(part, name) -> (inputs, outputs) of every matrix of one block."""
    sizes = axis_sizes(shape)
    return {
        (part, name): (sizes[inputs], sizes[outputs])
        for part, matrices in BLOCK.items()
        for name, (inputs, outputs) in matrices.items()
    }


def parameter_counts(shape: Shape) -> Counts:
    """Number of parameters by kind, with the padding rows of the tables."""
    table = round_up(shape.vocab_size, shape.vocab_multiple)
    layers = shape.num_decoder_layers
    value_layers = len(value_embed_layers(layers, shape.value_embed_gate_channels))
    smear = shape.smear_gate_channels + 1 if shape.smear_gate_channels else 0
    return Counts(
        token_embed=table * shape.emb_dim,
        value_embeds=value_layers * table * shape.num_kv_heads * shape.head_dim,
        lm_head=table * shape.emb_dim,
        matrices=layers * sum(math.prod(size) for size in block_matrices(shape).values())
        + value_layers * shape.value_embed_gate_channels * shape.num_kv_heads,
        scalars=2 * layers + smear + int(shape.use_backout),
    )


# What flops_per_token counts, in words for tables.
FLOP_COUNT = "6 per weight of a matrix product and 12 per query channel and key, as nanochat counts"


def flops_per_token(shape: Shape, windows: tuple[int, ...]) -> int:
    """Training FLOPs per token, forward and backward.

    6 per weight in a matrix product, and 12 per query channel and key for the two products of
    attention. A window w counts as w keys, not halved for the causal mask; what the backward pass
    computes again (remat_policy) does not count.
    Source: https://arxiv.org/abs/2204.02311, appendix B.
    """
    weights = parameter_counts(shape).scaling + shape.smear_gate_channels
    query_dim = shape.num_query_heads * shape.head_dim
    return 6 * weights + 12 * query_dim * sum(windows)


def horizon_tokens(ratio: float, scaling_parameters: int) -> int:
    """Training tokens at `ratio` tokens per scaling parameter."""
    return int(ratio * scaling_parameters)


def batch_tokens(scaling_parameters: int, reference_parameters: int, ratio: float) -> int:
    """Batch size in tokens: a power of two, by training tokens relative to the reference model."""
    relative = horizon_tokens(ratio, scaling_parameters) / (ratio * reference_parameters)
    return 2 ** max(0, round(math.log2(REFERENCE_BATCH_TOKENS * relative**BATCH_EXPONENT)))


def learning_rate_scale(batch: int) -> float:
    """Multiplier of the learning rates for a batch of `batch` tokens."""
    return math.sqrt(batch / REFERENCE_BATCH_TOKENS)


def weight_decay_scale(
    batch: int, scaling_parameters: int, reference_parameters: int, ratio: float
) -> float:
    """Multiplier of weight decay: keeps batch / (learning rate x decay x tokens) constant."""
    horizon = horizon_tokens(ratio, scaling_parameters)
    return math.sqrt(batch / REFERENCE_BATCH_TOKENS) * (ratio * reference_parameters / horizon)


def steps_for_ratio(ratio: float, scaling_parameters: int, batch: int) -> int:
    """Whole steps within horizon_tokens."""
    return horizon_tokens(ratio, scaling_parameters) // batch


def steps_for_flops(target_flops: float, flops_per_token: int, batch: int) -> int:
    """Steps that take `target_flops`, rounded to the nearest step."""
    return round(target_flops / (flops_per_token * batch))


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return max(n for n in range(1, min(number, limit) + 1) if number % n == 0)
