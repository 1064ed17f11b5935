"""Time of one Muon + AdamW update of a model, without the forward and backward pass.

    .venv/bin/python benchmarks/optimizer.py configs/base.yml model=d4 vocab_size=4096 max_target_length=512

Prints the groups, the quickest and the median of several updates, and the rate of the Polar Express
products.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()

import statistics
import time

import jax
import optax
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.distributed import runtime
from MaxNano.optimizers import groups
from MaxNano.training import state as train_state
from MaxNano.training.setup import set_up

UPDATES = 10


def polar_express_flops(params: dict, config: FrozenConfigDict) -> int:
    """Returns the FLOPs of the matrix products: three per iteration, on the shorter side's Gram
    matrix.
    """
    labels = jax.tree.leaves(groups.label_params(params, groups.parameter_groups(config)))
    total = 0
    for label, leaf in zip(labels, jax.tree.leaves(params), strict=True):
        if label == "muon":
            stack, short, long = leaf.shape[0], min(leaf.shape[1:]), max(leaf.shape[1:])
            total += stack * config.muon_iterations * (4 * short**2 * long + 2 * short**3)
    return total


def main(config: FrozenConfigDict) -> None:
    runtime.initialize(config)
    setup = set_up(config)
    optimizer, abstract, mesh = setup.optimizer, setup.abstract, setup.mesh
    jax.set_mesh(mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    parameter_groups = groups.parameter_groups(config)
    counts = groups.count_parameters(abstract.params, parameter_groups)
    for group in parameter_groups:
        count = counts.get(group.name, 0)
        print(f"{group.name:14} {count:>13,} parameters, learning rate {group.learning_rate:.5g}")

    def draw(key: jax.Array) -> dict:
        return jax.tree.map(lambda p: jax.random.normal(key, p.shape, p.dtype), abstract.params)

    def update(params, opt_state, grads, step):
        updates, opt_state = optimizer.update(grads, opt_state, params, step=step)
        return optax.apply_updates(params, updates), opt_state

    grads = jax.jit(draw, out_shardings=shardings.params)(jax.random.key(config.seed))
    update = jax.jit(
        update, donate_argnums=(0, 1), out_shardings=(shardings.params, shardings.opt_state)
    )
    state = train_state.initialize(config, setup.numerics, optimizer, abstract)
    arrays = state.params, state.opt_state
    seconds = []
    for step in range(UPDATES + 1):
        start = time.perf_counter()
        arrays = jax.block_until_ready(update(*arrays, grads, step))
        seconds.append(time.perf_counter() - start)

    timed = seconds[1:]  # the first update compiles
    flops = polar_express_flops(abstract.params, config)
    print(
        f"{mesh.size} x {jax.devices()[0].device_kind}: update {min(timed) * 1e3:.1f} ms "
        f"(median {statistics.median(timed) * 1e3:.1f}), "
        f"Polar Express {flops / 1e9:.4g} GFLOP, {flops / min(timed) / 1e9:.4g} GFLOP/s"
    )


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
