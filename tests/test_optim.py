"""The optimizer computes nanochat's updates, and each of its parts keeps its promise."""

import os
import textwrap
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest

from MaxNano import pyconfig
from MaxNano.interop import nanochat
from MaxNano.models.kernels import polar
from MaxNano.optimizers import groups, muon

ROOT = Path(__file__).resolve().parents[1]

# Matrices are (layers, in, out): with more outputs, more inputs, and as many of both.
SHAPES = {"wide": (3, 24, 64), "tall": (3, 64, 24), "square": (3, 32, 32)}


def make_config(*overrides):
    return pyconfig.initialize([str(ROOT / "configs/base.yml"), *overrides])


def normal(shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


# ---- nanochat's own step ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    """Config of the recorded run, and a function from a prefix to a parameter tree."""
    file = np.load(ROOT / "tests/golden/nanochat_small.npz")
    # What the optimizer was given: spread over 60 steps, with the base rates as they are.
    config = make_config(
        *("num_decoder_layers=4", "emb_dim=64", "head_dim=32", "num_query_heads=2"),
        *("vocab_size=250", "max_target_length=256"),
        *("steps=60", "warmup_steps=5", "muon_momentum_warmup_steps=12"),
        *("learning_rate_scale=1.0", "weight_decay_scale=1.0"),
    )

    def tree(prefix):
        named = {
            name.removeprefix(prefix): file[name] for name in file.files if name.startswith(prefix)
        }
        return jax.tree.map(jnp.asarray, nanochat.to_params(named, config))

    return config, tree


def test_first_step_is_nanochats(golden):
    config, tree = golden
    params, expected = tree("init/"), tree("step1/")
    optimizer = groups.make_optimizer(config, dtype="float32")
    updates, _ = jax.jit(optimizer.update)(tree("grad0/"), optimizer.init(params), params, step=0)
    got = paths(optax.apply_updates(params, updates))
    before = paths(params)
    for name, want in paths(expected).items():
        change = float(jnp.max(jnp.abs(want - before[name])))
        assert change > 0, name
        # Beside the error of the update itself, one rounding of the sum to float32.
        rounding = np.spacing(np.max(np.abs(want)))
        np.testing.assert_allclose(
            got[name], want, rtol=0, atol=1e-5 * change + rounding, err_msg=name
        )


# ---- Muon against an independent reading of its definition, in float64 --------------------------


class ReferenceMuon:
    """One (out, in) matrix at a time, in float64, as the papers and nanochat's specification put
    it.
    """

    coefficients = (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    )

    def __init__(self, weight):
        self.weight = weight
        self.average = np.zeros_like(weight)
        self.moment = 0.0
        self.decided = np.ones(weight.shape, bool)

    def step(self, gradient, lr, momentum, weight_decay):
        rows, columns = self.weight.shape
        self.average = momentum * self.average + (1 - momentum) * gradient
        x = (1 - momentum) * gradient + momentum * self.average
        # MuonEq.
        norms = np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
        x = x * (np.linalg.norm(x) / np.sqrt(rows)) / norms
        # Polar Express, through the singular values that it maps.
        left, values, right = np.linalg.svd(x, full_matrices=False)
        values = values / (1.01 * np.linalg.norm(x) + 1e-6)
        for a, b, c in self.coefficients:
            values = a * values + b * values**3 + c * values**5
        x = (left * values) @ right
        # Muon+.
        x = x * np.sqrt(min(rows, columns)) / max(np.linalg.norm(x), 1e-6)
        # NorMuon.
        axis = 1 if rows >= columns else 0
        self.moment = 0.9 * self.moment + 0.1 * np.mean(x**2, axis=axis, keepdims=True)
        scaled = x / np.sqrt(np.maximum(self.moment, 1e-10))
        x = scaled * np.linalg.norm(x) / max(np.linalg.norm(scaled), 1e-10)
        # Cautious decay, and the larger rate of matrices with more rows than columns.
        lr = lr * np.sqrt(max(1, rows / columns))
        # Rounding decides whether next to nothing points the same way as a weight: those weights
        # are not compared.
        self.decided &= np.abs(x) > 1e-5 * np.abs(x).max()
        aligned = x * self.weight >= 0
        self.weight = self.weight - lr * x - lr * weight_decay * self.weight * aligned


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_muon_over_several_steps(shape):
    config = make_config(
        "steps=40",
        "warmup_steps=0",
        "muon_momentum_warmup_steps=10",
        "warmdown_ratio=0.0",
        "weight_decay=0.3",
        "weight_decay_scale=1.0",
        "weight_decay_schedule=linear",
        "matrix_lr=0.1",
        "learning_rate_scale=1.0",
    )
    weights = normal(shape)
    references = [ReferenceMuon(weight.T) for weight in weights]
    params = {"layers": {"mlp": {"wi": jnp.float32(weights)}}}
    optimizer = groups.make_optimizer(config, dtype="float32")
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(4):
        gradients = normal(shape, seed=step + 1, scale=1e-3)
        grads = {"layers": {"mlp": {"wi": jnp.float32(gradients)}}}
        updates, state = update(grads, state, params, step=step)
        params = optax.apply_updates(params, updates)
        for reference, gradient in zip(references, gradients, strict=True):
            reference.step(
                gradient.T,
                lr=0.1,
                momentum=0.85 + 0.012 * step,
                weight_decay=0.3 * (1 - step / 40),
            )
    want = np.stack([reference.weight.T for reference in references])
    change = np.abs(want - weights).max()
    decided = np.stack([reference.decided.T for reference in references])
    assert np.mean(decided) > 0.999
    got = np.asarray(params["layers"]["mlp"]["wi"])
    np.testing.assert_allclose(got[decided], want[decided], rtol=0, atol=1e-5 * change)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_polar_express_makes_singular_values_one(shape):
    left, _, right = np.linalg.svd(normal(shape), full_matrices=False)
    matrix = jnp.float32((left * np.geomspace(1, 0.05, min(shape))) @ right)
    x = muon.polar_express(matrix, iterations=5, norm_margin=1.01)
    np.testing.assert_allclose(np.linalg.svd(x, compute_uv=False), 1, atol=0.15)
    # Singular vectors stay: the product with the exact polar factor is symmetric.
    product = np.asarray(x).T @ (left @ right)
    np.testing.assert_allclose(product, product.T, atol=1e-4)


def test_polar_express_in_bfloat16_stays_close():
    matrix = jnp.float32(normal((2, 32, 128)))
    exact = muon.polar_express(matrix, iterations=5, norm_margin=1.01)
    x = muon.polar_express(matrix.astype(jnp.bfloat16), iterations=5, norm_margin=1.01)
    assert x.dtype == jnp.bfloat16
    assert jnp.linalg.norm(x - exact) < 0.02 * jnp.linalg.norm(exact)


@pytest.mark.parametrize("shape", [(2, 128, 384), (2, 384, 128), (2, 256, 256)])
@pytest.mark.parametrize("iterations", [1, 5])
def test_the_kernel_of_polar_express_is_its_definition(shape, iterations):
    """In bfloat16 as near to float32 as the definition in bfloat16."""
    matrices = jnp.float32(normal(shape))

    def by_kernel(x):
        x = muon.inside_interval(x, 1.01)
        return polar.iterate(x, coefficients=muon.POLAR_EXPRESS[:iterations], interpret=True)

    def by_definition(x):
        return muon.polar_express(x, iterations, norm_margin=1.01)

    exact = by_definition(matrices)
    atol = 1e-5 * np.abs(exact).max()
    np.testing.assert_allclose(by_kernel(matrices), exact, rtol=0, atol=atol)
    rounded = matrices.astype(jnp.bfloat16)
    errors = [jnp.linalg.norm(f(rounded) - exact) for f in (by_kernel, by_definition)]
    assert errors[0] < 1.1 * errors[1]


def test_what_the_kernel_of_polar_express_takes():
    assert polar.fits(1536, 6144, 2) and polar.fits(8192, 2048, 2)  # of d24 and d32
    assert not polar.fits(12, 12, 2)  # value gates
    assert not polar.fits(3072, 12288, 2)  # of d48: more than a chip's VMEM


def test_owners_run_the_kernel_of_polar_express():
    """On eight devices that share layers, or layers and FSDP's parts of them; where they do not
    divide the layers, nothing runs.
    """
    code = """
        from functools import partial
        import jax, jax.numpy as jnp, numpy as np
        from MaxNano import pyconfig
        from MaxNano.distributed.mesh import make_mesh
        from MaxNano.distributed.sharding import over_owners
        from MaxNano.models.kernels import polar
        from MaxNano.optimizers import muon

        def run(layers, *words):
            config = pyconfig.initialize(["configs/base.yml", "model=d4", *words])
            matrices = jnp.float32(np.random.default_rng(0).normal(size=(layers, 128, 256)))
            inside = muon.inside_interval(matrices, 1.01)
            iterate = partial(polar.iterate, coefficients=muon.POLAR_EXPRESS, interpret=True)
            with jax.set_mesh(make_mesh(config, jax.devices())):
                rules = config.logical_axis_rules
                found = jax.jit(lambda x: over_owners(iterate, x, rules))(inside)
            if found is None:
                return None
            expected = muon.polar_express(matrices, 5, norm_margin=1.01)
            return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())

        assert run(8, "ici_data_parallelism=8") < 1e-5
        assert run(6, "ici_data_parallelism=8") < 1e-5  # every device has all
        assert run(8, "ici_data_parallelism=4", "ici_fsdp_parallelism=2") < 1e-5
        assert run(9, "ici_data_parallelism=4", "ici_fsdp_parallelism=2") is None
        print("equal")
    """
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = programs.run("-c", textwrap.dedent(code), env={**os.environ, "XLA_FLAGS": flags})
    assert done.stdout == "equal\n", done.stderr


def test_fewer_iterations_are_the_first_ones():
    values = np.array([0.5, 0.1, 0.02])
    x = muon.polar_express(jnp.diag(jnp.float32(values)), iterations=1, norm_margin=1.0)
    a, b, c = muon.POLAR_EXPRESS[0]
    values = values / (np.linalg.norm(values) + 1e-6)
    np.testing.assert_allclose(
        np.diagonal(x), a * values + b * values**3 + c * values**5, rtol=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equilibrated_rows_have_one_norm(shape):
    weights = normal(shape) * np.geomspace(1e-3, 1, shape[-1])
    x = muon.equilibrate_rows(jnp.float32(weights))
    total = np.linalg.norm(weights, axis=(1, 2))
    np.testing.assert_allclose(np.linalg.norm(x, axis=(1, 2)), total, rtol=1e-5)
    rows = np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(rows, total[:, None] / np.sqrt(shape[-1]) + 0 * rows, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_renormalized_like_a_semi_orthogonal_matrix(shape):
    x = muon.renormalize(jnp.float32(normal(shape, scale=7.0)))
    np.testing.assert_allclose(np.linalg.norm(x, axis=(1, 2)), np.sqrt(min(shape[1:])), rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_neuron_variance_keeps_the_norm_and_evens_out_neurons(shape):
    normuon = muon.scale_by_neuron_variance(0.9)
    longer = 1 if shape[1] > shape[2] else 2
    uneven = np.expand_dims(np.geomspace(0.1, 10, shape[longer]), 2 - longer)
    weights = jnp.float32(normal(shape) * uneven)
    state = normuon.init(weights)
    assert state.second_moment.shape == tuple(
        size if axis in (0, longer) else 1 for axis, size in enumerate(shape)
    )
    x, state = normuon.update(weights, state)
    axes = (1, 2)
    np.testing.assert_allclose(
        np.linalg.norm(x, axis=axes), np.linalg.norm(weights, axis=axes), rtol=1e-5
    )
    neurons = np.linalg.norm(x, axis=3 - longer)
    np.testing.assert_allclose(
        neurons, neurons.mean(axis=1, keepdims=True) + 0 * neurons, rtol=1e-4
    )


def test_cautious_decay_spares_weights_that_grow():
    decay = muon.add_cautious_weight_decay(lambda step: 0.1 * step)
    updates = jnp.array([[1.0, -1.0, 1.0, 0.0]])
    params = jnp.array([[2.0, 2.0, -2.0, 2.0]])
    got, _ = decay.update(updates, decay.init(params), params, step=2)
    # Updates are subtracted: the second and third weights move away from zero.
    np.testing.assert_allclose(got, [[1.4, -1.0, 1.0, 0.4]], rtol=1e-6)


def test_zero_gradient_decays_in_full():
    config = make_config("steps=10", "warmup_steps=0", "weight_decay=0.5", "weight_decay_scale=1.0")
    params = {"layers": {"attention": {"query": jnp.float32(normal((2, 8, 8)))}}}
    optimizer = groups.make_optimizer(config, dtype="float32")
    grads = optax.tree.zeros_like(params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params, step=0)
    rate = config.matrix_lr * config.learning_rate_scale
    jax.tree.map(
        lambda u, p: np.testing.assert_allclose(u, -rate * 0.5 * p, rtol=1e-5), updates, params
    )


@pytest.mark.parametrize("key", ["muon_row_equilibration", "muon_renormalize", "muon_beta2"])
def test_parts_of_muon_can_be_left_out(key):
    params = {"layers": {"mlp": {"wi": jnp.float32(normal((1, 8, 16)))}}}
    off = "0" if key == "muon_beta2" else "false"

    def first_update(*overrides):
        config = make_config("steps=10", "weight_decay=0.0", *overrides)
        optimizer = groups.make_optimizer(config, dtype="float32")
        return optimizer.update(params, optimizer.init(params), params, step=0)[0]

    different = jax.tree.map(
        lambda a, b: float(jnp.max(jnp.abs(a - b))), first_update(), first_update(f"{key}={off}")
    )
    assert different["layers"]["mlp"]["wi"] > 1e-6


# ---- AdamW --------------------------------------------------------------------------------------


def test_adamw_over_several_steps():
    config = make_config(
        "emb_dim=768",
        "steps=40",
        "warmup_steps=0",
        "warmdown_ratio=0.0",
        "learning_rate_scale=2.0",
        "unembedding_lr=0.05",
        "lm_head_weight_decay=0.4",
    )
    weights = normal((16, 8))
    want, mean, square = weights, 0.0, 0.0
    params = {"lm_head": jnp.float32(weights)}
    optimizer = groups.make_optimizer(config, dtype="float32")
    state = optimizer.init(params)
    beta1, beta2 = config.lm_head_betas
    for step in range(4):
        gradient = normal((16, 8), seed=step + 1)
        updates, state = optimizer.update(
            {"lm_head": jnp.float32(gradient)}, state, params, step=step
        )
        params = optax.apply_updates(params, updates)
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        corrected = mean / (1 - beta1 ** (step + 1))
        root = np.sqrt(square / (1 - beta2 ** (step + 1)))
        want = want * (1 - 0.1 * 0.4) - 0.1 * corrected / (root + config.adam_epsilon)
    np.testing.assert_allclose(
        params["lm_head"], want, rtol=0, atol=1e-5 * np.abs(want - weights).max()
    )


def test_bfloat16_tables_are_computed_in_float32_and_rounded_once():
    config = make_config("steps=10", "warmup_steps=0")
    optimizer = groups.make_optimizer(config, dtype="bfloat16")
    narrow = {"token_embed": jnp.asarray(normal((64, 8)), jnp.bfloat16)}
    wide = optax.tree.cast(narrow, jnp.float32)
    state, wide_state = optimizer.init(narrow), optimizer.init(wide)
    for step in range(3):
        grads = {"token_embed": jnp.asarray(normal((64, 8), seed=step + 1), jnp.bfloat16)}
        # The float32 run starts each step from the rounded values, so that only arithmetic is
        # compared.
        wide, wide_state = optax.tree.cast_like((narrow, state), (wide, wide_state))
        updates, state = optimizer.update(grads, state, narrow, step=step)
        exact, wide_state = optimizer.update(
            optax.tree.cast(grads, jnp.float32), wide_state, wide, step=step
        )
        narrow = optax.apply_updates(narrow, updates)
        wide = optax.apply_updates(wide, exact)
        assert updates["token_embed"].dtype == jnp.float32
        np.testing.assert_array_equal(
            narrow["token_embed"], wide["token_embed"].astype(jnp.bfloat16)
        )
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (64, 8)]
    assert [leaf.dtype for leaf in moments] == [jnp.bfloat16, jnp.bfloat16]


# ---- Groups -------------------------------------------------------------------------------------


def every_parameter():
    """A tree with the path of every parameter there is, and a size that tells its group."""
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    stack = shape((2, 4, 4))
    return {
        "lm_head": shape((8, 4)),
        "token_embed": shape((8, 4)),
        "value_embeds": shape((1, 8, 4)),
        "resid_lambdas": shape((2,)),
        "x0_lambdas": shape((2,)),
        "smear_gate": shape((3,)),
        "smear_lambda": shape(()),
        "backout_lambda": shape(()),
        "value_gate": shape((1, 2, 2)),
        "layers": {
            "attention": {"query": stack, "key": stack, "value": stack, "out": stack},
            "mlp": {"wi": shape((2, 4, 16)), "wo": shape((2, 16, 4))},
        },
    }


def test_every_parameter_has_its_group():
    labels = paths(groups.label_params(every_parameter(), groups.parameter_groups(make_config())))
    matrices = {name for name, group in labels.items() if group == "muon"}
    assert matrices == {name for name in labels if name.startswith("layers/")} | {"value_gate"}
    smear = {name for name, group in labels.items() if group == "smear"}
    assert smear == {"smear_gate", "smear_lambda", "backout_lambda"}
    for name in set(labels) - matrices - smear:
        assert labels[name] == name


def test_uncovered_parameter_is_named():
    params = {"layers": {"attention": {"query": jnp.ones((1, 2, 2))}, "norm": jnp.ones(2)}}
    with pytest.raises(ValueError, match="layers/norm matches no group"):
        groups.make_optimizer(make_config(), dtype="float32").init(params)


def test_doubly_covered_parameter_is_named():
    rows = [
        group._replace(pattern=r"smear_gate|x0_\w+") if group.name == "smear" else group
        for group in groups.parameter_groups(make_config())
    ]
    with pytest.raises(ValueError, match="x0_lambdas matches x0_lambdas and smear"):
        groups.label_params({"x0_lambdas": jnp.ones(2)}, rows)


def test_a_group_with_another_optimizer_is_one_row(monkeypatch):
    """Plain gradient descent for the head, as a row in place of the table's."""

    def use_sgd(group, config, dtype):
        return optax.add_decayed_weights(group.weight_decay)

    usual = groups.parameter_groups

    def changed(config):
        row = groups.ParameterGroup("lm_head", "lm_head", use_sgd, 0.5, (0.0, 0.0), 0.1)
        return tuple(row if group.name == "lm_head" else group for group in usual(config))

    monkeypatch.setattr(groups, "parameter_groups", changed)
    config = make_config("steps=10", "warmup_steps=0")
    params = {"lm_head": jnp.float32([[2.0]]), "x0_lambdas": jnp.ones(2)}
    optimizer = groups.make_optimizer(config, dtype="float32")
    updates, _ = optimizer.update(params, optimizer.init(params), params, step=0)
    np.testing.assert_allclose(updates["lm_head"], [[-0.5 * (2 + 0.1 * 2)]], rtol=1e-6)
    assert updates["x0_lambdas"][0] != 0


def test_hyperparameters_of_the_record_recipe():
    # At emb_dim 1536 and a batch of 2^20 tokens, the factors of width and batch cancel for tables.
    config = make_config("emb_dim=1536", "head_dim=128", "global_batch_tokens=1048576", "steps=10")
    rows = groups.parameter_groups(config)
    assert groups.count_parameters(every_parameter(), rows) == {
        "lm_head": 32,
        "token_embed": 32,
        "value_embeds": 32,
        "resid_lambdas": 2,
        "x0_lambdas": 2,
        "smear": 5,
        "muon": 4 * 32 + 2 * 128 + 4,
    }
    rates = [row.learning_rate for row in rows]
    want = [0.008, 0.3, 0.15, 0.0070711, 0.70711, 0.2, 0.0282843]
    np.testing.assert_allclose(rates, want, rtol=1e-5)
    betas = [row.betas for row in rows]
    assert betas[:4] == [(0.8, 0.96), (0.8, 0.995), (0.8, 0.995), (0.8, 0.95)]
    assert betas[4:] == [(0.96, 0.95), (0.8, 0.95), (0.97, 0.9)]
    decays = [row.weight_decay for row in rows]
    np.testing.assert_allclose(
        decays, [0.01, 0.001, 0.01, 0.05, 0, 0, 0.28 * config.weight_decay_scale], rtol=1e-6
    )


def test_empty_groups_are_not_counted():
    rows = groups.parameter_groups(make_config())
    assert groups.count_parameters({"lm_head": jnp.ones((4, 2))}, rows) == {"lm_head": 8}


# ---- Layout -------------------------------------------------------------------------------------


def test_layers_cut_over_devices_need_no_communication():
    code = """
        import re, jax, jax.numpy as jnp, numpy as np, optax
        from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
        from MaxNano import pyconfig
        from MaxNano.optimizers import groups as optim

        config = pyconfig.initialize(["configs/base.yml", "steps=10", "warmup_steps=0", "muon_iterations=2"])
        optimizer = optim.make_optimizer(config, dtype="float32")
        draw = np.random.default_rng(0).normal
        params = {
            "layers": {
                "attention": {"query": draw(size=(8, 16, 16))},
                "mlp": {"wi": draw(size=(8, 16, 64)), "wo": draw(size=(8, 64, 16))},
            },
            "value_embeds": draw(size=(8, 32, 16)),
            "token_embed": draw(size=(32, 16)),
        }
        params = jax.tree.map(np.float32, params)
        grads = jax.tree.map(np.cos, params)

        def step(params, state, grads):
            updates, state = optimizer.update(grads, state, params, step=3)
            return optax.apply_updates(params, updates), state

        state = jax.jit(optimizer.init)(params)
        expected = jax.jit(step)(params, state, grads)

        mesh = Mesh(np.array(jax.devices()), ("fsdp",), axis_types=(AxisType.Auto,))
        assert mesh.size == 8
        def cut(x):
            return NamedSharding(mesh, PartitionSpec("fsdp") if x.ndim >= 3 else PartitionSpec())
        def whole(x):
            return NamedSharding(mesh, PartitionSpec())
        def rows(x):  # as FSDP shards matrices
            by_rows = x.ndim >= 3 and x.shape[1] > 1
            return NamedSharding(mesh, PartitionSpec(None, "fsdp") if by_rows else PartitionSpec())
        def run(place_params, place_state=cut):
            places = jax.tree.map(place_params, params), jax.tree.map(place_state, state)
            with jax.set_mesh(mesh):
                compiled = jax.jit(
                    step, in_shardings=(*places, places[0]), out_shardings=places
                ).lower(params, state, grads).compile()
            got = compiled(*jax.device_put((params, state, grads), (*places, places[0])))
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected
            )
            text = compiled.as_text()
            products = set(re.findall(r"f32(\\[[0-9,]*\\])\\S* dot\\(", text))
            kinds = "(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
            sent = re.findall(r"= (\\S+|\\(.*\\)) " + kinds + r"(?:-start)?\\(", text)
            sizes = {}
            for result, kind in sent:
                parts = re.findall(r"f32\\[([0-9,]+)\\]", result)
                total = sum(int(np.prod(eval(f"[{part}]"))) for part in parts)
                sizes[kind] = max(total, sizes.get(kind, 0))
            return products, {kind for kind, size in sizes.items() if size > SCALES}

        SCALES = 0
        print(run(cut))
        print(run(whole))
        SCALES = 8 * 64  # of the neurons of all layers
        print(run(rows, rows))
    """
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = programs.run("-c", textwrap.dedent(code), env={**os.environ, "XLA_FLAGS": flags})
    assert done.returncode == 0, done.stderr
    cut, whole, rows = map(eval, done.stdout.splitlines())
    # A device's products are those of its own layer, even where parameters are whole and only the
    # state is cut; then the new layers are gathered, and nothing else is sent.
    assert cut == ({"[16,16]", "[16,64]", "[64,16]"}, set())
    assert whole == (cut[0], {"all-gather"})
    # With FSDP a matrix travels to its owner, and its update back.
    assert rows == (cut[0], {"all-to-all"})
