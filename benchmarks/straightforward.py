"""Compares the cycles of MaxNano's train step with those of a straightforward port.

    .venv/bin/python benchmarks/straightforward.py configs/base.yml model=d24 compile_topology=v6e-8

The port ("recipe") was measured on a real v6e-8: 1.43 s per step of 524,288 tokens with d24. Both
steps are compiled for the same slice by the same compiler in the same run and costed by the same
rules, so that the ratio of their cycles gives an estimate for MaxNano. Nothing is run. Prints both
reports, their sums and a JSON line.

The recipe: parameters, gradients and Adam's moments replicated on every chip, only Muon's moments
sharded; 16 micro-batches of 2 rows, with an all-reduce of all gradients in each; 24 unrolled
layers, nothing rematerialized; Splash attention in blocks of 512 with a separate backward pass for
the queries, rotary embedding and norms left to the compiler; gradients of value embeddings as a
float32 product with a one-hot matrix at the highest precision; a head at the highest precision with
all logits in float32. Source: https://github.com/tucan9389/nanochat-jax (runs/speedrun.sh, June
2026) for the recipe and its time.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()

import json
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from benchmarks import common
from MaxNano import console, pyconfig
from MaxNano.compile import programs as compile_programs
from MaxNano.compile import report as compile_report
from MaxNano.compile import topologies
from MaxNano.distributed import hardware, sharding
from MaxNano.distributed.mesh import make_mesh
from MaxNano.models import attention, layers, transformer
from MaxNano.models.setup import architecture
from MaxNano.optimizers import groups
from MaxNano.training import setup as training_setup
from MaxNano.training import state as train_state
from MaxNano.training.memory_plan import fit_memory
from MaxNano.training.setup import BatchPlan, flops_per_token, plan_batch

MEASURED_SECONDS = 1.43  # per step of the recipe on a v6e-8
ROWS = 2  # per chip and micro-batch
SPLASH = {
    "splash_short_window": 1,  # all layers use the long block sizes
    "splash_long_forward": (512, 512, 256),
    "splash_long_backward": (512, 512, 512),
    "splash_fused_backward": False,
}
RULES = (("layers", "data"), ("activation_batch", "data"))  # for Muon's moments, and for the rows
HIGHEST = jax.lax.Precision.HIGHEST


# ---- The model, from MaxNano's parameters, with the layers unstacked ----------------------------


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """MaxNano's parameter tree with a list instead of each stack of layers."""
    unstacked = dict(params)
    unstacked["layers"] = _rows(params["layers"])
    for name in ("value_embeds", "value_gate"):
        if name in params:
            unstacked[name] = _rows(params[name])
    return unstacked


def _rows(tree):
    count = len(jax.tree.leaves(tree)[0])
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count)]


def stack(params: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `unstack`."""
    lists = {name: value for name, value in params.items() if isinstance(value, list)}
    return params | {
        name: jax.tree.map(lambda *x: jnp.stack(x), *rows) for name, rows in lists.items()
    }


def norm(x: jax.Array, epsilon: float) -> jax.Array:
    """RMS norm of the last axis, in float32, differentiated by JAX."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)).astype(
        x.dtype
    )


@jax.custom_vjp
def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of a table; their gradient is a product with a one-hot matrix, float32 at the highest
    precision.
    """
    return table[tokens]


def _lookup_backward(residuals, grad):
    like, tokens = residuals
    hot = jax.nn.one_hot(tokens.reshape(-1), len(like), dtype=jnp.float32)
    rows = grad.reshape(-1, grad.shape[-1]).astype(jnp.float32)
    return jnp.einsum("TV,TW->VW", hot, rows, precision=HIGHEST).astype(like.dtype), None


lookup.defvjp(
    lambda table, tokens: (lookup(table, tokens), (table[:, :0], tokens)), _lookup_backward
)


class Recipe(NamedTuple):
    """The parts of the recipe's step."""

    config: FrozenConfigDict
    mesh: Mesh
    dtype: str
    optimizer: optax.GradientTransformationExtraArgs
    abstract: train_state.TrainState  # as in MaxNano
    plan: BatchPlan
    kernel: str


def hidden_states(recipe: Recipe, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Token ids (B, L) -> normalized final hidden states (B, L, D)."""
    config, dtype = recipe.config, recipe.dtype
    settings = attention.KernelSettings.from_config(config, recipe.mesh.devices.flat[0].platform)
    tables = layers.rotary_tables(tokens.shape[1], config.head_dim, config.rope_theta)
    cos, sin = (jnp.asarray(table, dtype)[None, :, None] for table in tables)
    normed = partial(norm, epsilon=config.norm_epsilon)

    def heads(x, weight):
        return (x @ weight.astype(dtype)).reshape(*x.shape[:2], -1, config.head_dim)

    def rotated(x):
        a, b = jnp.split(x, 2, axis=-1)
        return (
            normed(jnp.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1))
            * config.qk_norm_scale
        )

    def attend(x, weights, value_rows, gate, window):
        q, k, v = (heads(x, weights[name]) for name in ("query", "key", "value"))
        if value_rows is not None:
            share = jax.nn.sigmoid(x[..., : config.value_embed_gate_channels] @ gate.astype(dtype))
            v = v + config.value_embed_gate_range * share[..., None] * value_rows.reshape(v.shape)
        y = attention.attention(
            *(part.swapaxes(1, 2) for part in (rotated(q), rotated(k), v)),
            window=window,
            kernel=recipe.kernel,
            settings=settings,
            rules=config.logical_axis_rules,
        )
        return y.swapaxes(1, 2).reshape(*x.shape[:2], -1) @ weights["out"].astype(dtype)

    x = normed(params["token_embed"][tokens].astype(dtype))
    if config.smear_gate_channels:
        gate = jax.nn.sigmoid(
            x[:, 1:, : config.smear_gate_channels] @ params["smear_gate"].astype(dtype)
        )
        share = params["smear_lambda"].astype(dtype) * gate[..., None]
        x = jnp.concatenate([x[:, :1], x[:, 1:] + share * x[:, :-1]], axis=1)
    x0 = x
    value_rows = iter(
        [
            (lookup(table, tokens).astype(dtype), gate)
            for table, gate in zip(
                params.get("value_embeds", ()), params.get("value_gate", ()), strict=True
            )
        ]
    )
    for i, kind in enumerate(transformer.layer_kinds(config)):
        weights = params["layers"][i]
        x = (
            params["resid_lambdas"][i].astype(dtype) * x
            + params["x0_lambdas"][i].astype(dtype) * x0
        )
        rows, gate = next(value_rows) if kind.has_value_embed else (None, None)
        x = x + attend(normed(x), weights["attention"], rows, gate, kind.window)
        inner = jnp.square(jax.nn.relu(normed(x) @ weights["mlp"]["wi"].astype(dtype)))
        x = x + inner @ weights["mlp"]["wo"].astype(dtype)
        if i == config.num_decoder_layers // 2:
            middle = x
    if config.use_backout:
        x = x - params["backout_lambda"].astype(dtype) * middle
    return normed(x)


def mean_loss(
    recipe: Recipe, params: dict[str, Any], inputs: jax.Array, targets: jax.Array
) -> jax.Array:
    """Mean negative log-likelihood of the targets that are not -1, from whole float32 logits."""
    config = recipe.config
    x = hidden_states(recipe, params, inputs)
    head = params["lm_head"].astype(recipe.dtype)
    logits = jnp.einsum("BLD,VD->BLV", x, head, precision=HIGHEST)[..., : config.vocab_size].astype(
        jnp.float32
    )
    if config.logits_soft_cap:
        logits = config.logits_soft_cap * jnp.tanh(logits / config.logits_soft_cap)
    likelihoods = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(likelihoods, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(nll * (targets >= 0)) / jnp.maximum(jnp.sum(targets >= 0), 1)


# ---- The step -----------------------------------------------------------------------------------


def set_up(
    config: FrozenConfigDict, devices: list[Any], *, kernel: str = "splash", rows: int = ROWS
) -> Recipe:
    """The recipe with the sizes and learning rates of a config."""
    config = pyconfig.replace(
        config, "recipe", **SPLASH, logical_axis_rules=RULES, per_device_batch_size=rows
    )
    mesh = make_mesh(config, devices)
    backend = mesh.devices.flat[0].platform
    dtype = hardware.compute_dtype(config, backend)
    numerics = transformer.Numerics(
        dtype, hardware.embedding_dtype(config, backend), kernel, "scatter", backend
    )
    optimizer = groups.make_optimizer(config, dtype=dtype)
    abstract = train_state.abstract_state(config, architecture(config, numerics), optimizer, mesh)
    plan = plan_batch(config, sharding.data_parallel_size(mesh, RULES))
    return Recipe(config, mesh, dtype, optimizer, abstract, plan, kernel)


def train_step(recipe: Recipe, params, opt_state, count, inputs, targets):
    """One update from (micro-batches, rows, L) tokens, with parameters as from `unstack`; also
    returns the loss.
    """

    def accumulate(total, micro):
        loss, grads = jax.value_and_grad(partial(mean_loss, recipe))(params, *micro)
        return jax.tree.map(jnp.add, total, grads), loss

    grads, losses = jax.lax.scan(
        accumulate, jax.tree.map(jnp.zeros_like, params), (inputs, targets)
    )
    grads = jax.tree.map(lambda grad: grad / recipe.plan.accumulation_steps, grads)
    stacked = stack(params)
    updates, opt_state = recipe.optimizer.update(stack(grads), opt_state, stacked, step=count)
    return unstack(optax.apply_updates(stacked, updates)), opt_state, jnp.mean(losses)


def jit_step(recipe: Recipe):
    """The jitted step; it donates parameters and optimizer state."""
    replicated = NamedSharding(recipe.mesh, PartitionSpec())
    sharded = jax.tree.map(lambda leaf: leaf.sharding, recipe.abstract.opt_state)
    return jax.jit(
        partial(train_step, recipe),
        donate_argnums=(0, 1),
        out_shardings=(replicated, sharded, replicated),
    )


def compile_recipe(recipe: Recipe) -> compile_report.CostReport:
    """The report of the recipe's step. Raises jax.errors.JaxRuntimeError if it does not fit."""
    config, plan, mesh = recipe.config, recipe.plan, recipe.mesh
    replicated = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(unstack, recipe.abstract.params),
    )
    shape = (
        plan.accumulation_steps,
        plan.data_parallel_size * plan.micro_rows,
        config.max_target_length,
    )
    tokens = jax.ShapeDtypeStruct(
        shape, jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(None, "data"))
    )
    started = time.monotonic()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jit_step(recipe).lower(
            params, recipe.abstract.opt_state, recipe.abstract.step, tokens, tokens
        )
    compiled = lowered.compile()
    return compile_report.analyze(
        compiled,
        hardware.chip(mesh.devices.flat[0]),
        mesh=mesh,
        vocab_size=config.vocab_size,
        work=compile_report.ProgramWork(
            flops_per_token(config) * config.global_batch_tokens,
            config.global_batch_tokens,
            config.steps,
        ),
        compile_seconds=time.monotonic() - started,
    )


# ---- The program --------------------------------------------------------------------------------


def main(config: FrozenConfigDict) -> None:
    """Compile and print both."""
    jax.config.update("jax_enable_compilation_cache", False)
    devices = topologies.slice_devices(config.compile_topology, config.compile_num_slices)
    setup = fit_memory(training_setup.set_up(config, devices))
    _, product = compile_programs.compile_program(setup, "train")
    print_report("MaxNano", product)
    recipe = compile_recipe(set_up(config, devices))
    print_report("recipe", recipe)
    ratio = recipe.cycles / product.cycles
    rows = [
        {"step": name, **common.costs(report)}
        for name, report in (("MaxNano", product), ("recipe", recipe))
    ]
    print(
        f"ESTIMATED for {config.compile_topology}, not measured: {config.num_decoder_layers} layers of "
        f"{config.emb_dim}, {config.global_batch_tokens:,} tokens per step; M cycles per chip"
    )
    common.show(rows)
    print(
        f"The recipe takes {ratio:.2f} times MaxNano's cycles. It was measured at {MEASURED_SECONDS} s per step with "
        f"d24 on v6e-8; MaxNano would take {MEASURED_SECONDS / ratio:.2f} s by that ratio"
    )
    print(json.dumps({"model": config.model, "ratio": ratio, "rows": rows}))


def print_report(name: str, report: compile_report.CostReport) -> None:
    """Print all tables of a report."""
    for title, header, rows in report.tables():
        console.print_table(f"{name}: {title}", header, rows)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
