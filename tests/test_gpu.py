"""What only an NVIDIA GPU can show: python -m pytest -m gpu tests/test_gpu.py on a machine that has
one.

Everything runs in processes of its own, since the test process keeps to the CPU.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not list(Path("/dev").glob("nvidia[0-9]*")), reason="there is no NVIDIA GPU here"
    ),
]


def run(program: str, **environment: str) -> dict:
    """The JSON line that a program prints last."""
    # The tests' own settings are for the CPU.
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=env | environment,
        text=True,
        capture_output=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


ATTENTION = """
    import json
    import jax, jax.numpy as jnp
    import numpy as np
    from MaxNano import pyconfig
    from MaxNano.models import attention

    config = pyconfig.initialize([str(pyconfig.BASE)])
    settings = attention.KernelSettings.from_config(config)

    def loss(kernel, window, weights, *qkv):
        out = attention.attention(
            *qkv, window=window, kernel=kernel, settings=settings, rules=config.logical_axis_rules
        )
        return jnp.sum(out.astype(jnp.float32) * weights), out

    rows = []
    for length, heads, kv_heads, head_dim, window in [
        (512, 4, 4, 128, 512), (512, 4, 4, 128, 128), (384, 4, 2, 128, 100), (1000, 6, 2, 64, 256),
        (2048, 6, 6, 128, 512), (256, 2, 1, 256, 77),
    ]:
        rng = np.random.default_rng(length + window)
        q = rng.standard_normal((2, heads, length, head_dim), np.float32)
        k, v = rng.standard_normal((2, 2, kv_heads, length, head_dim), np.float32)
        weights = rng.standard_normal(q.shape, np.float32)
        q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))

        def value_and_grads(kernel, dtype):
            function = jax.value_and_grad(
                lambda *qkv: loss(kernel, window, weights, *qkv), argnums=(0, 1, 2), has_aux=True
            )
            with jax.default_matmul_precision("highest"):
                (_, out), grads = jax.jit(function)(*(x.astype(dtype) for x in (q, k, v)))
            return [np.asarray(x, np.float64) for x in (out, *grads)]

        exact = value_and_grads("reference", jnp.float32)
        error = lambda found: [
            float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, exact)
        ]
        rows.append([
            [length, heads, kv_heads, head_dim, window],
            error(value_and_grads("cudnn", jnp.bfloat16)), error(value_and_grads("reference", jnp.bfloat16)),
        ])
    [device] = jax.devices()[:1]
    auto = {
        dtype: attention.resolve("auto", device, dtype=dtype, head_dim=128) for dtype in ("bfloat16", "float32")
    }
    print(json.dumps({"rows": rows, "auto": auto}))
"""


@pytest.fixture(scope="module")
def kernels():
    return run(ATTENTION)


def test_cudnn_attention_equals_the_reference(kernels):
    """Outputs and gradients in bfloat16 are as near to float32's as the reference in bfloat16 is,
    times two.
    """
    print()
    for shape, errors, expected in kernels["rows"]:
        print(shape, [f"{x:.1e}" for x in errors], [f"{x:.1e}" for x in expected])
        assert all(
            error <= max(2 * other, 5e-3) for error, other in zip(errors, expected, strict=True)
        )


def test_auto_takes_cudnn_in_16_bits_and_chunked_in_float32(kernels):
    assert kernels["auto"] == {"bfloat16": "cudnn", "float32": "chunked"}


# Two layers of d4: with and without a value embedding, with a short and a long window; two
# micro-batches.
LOSSES = """
    import json
    import sys
    import numpy as np
    import jax
    from MaxNano import pyconfig
    from MaxNano.data.loader import put_global, to_batch
    from MaxNano.distributed import runtime, sharding
    from MaxNano.models import attention
    from MaxNano.training import state as train_state
    from MaxNano.training.memory_plan import compile_train
    from MaxNano.training.setup import set_up
    from MaxNano.training.step import build_programs

    COMMON = [
        str(pyconfig.BASE), "model=d4", "num_decoder_layers=2", "emb_dim=256", "max_target_length=512",
        "vocab_size=4096", "global_batch_tokens=2048", "per_device_batch_size=2", "jax_cache_dir=",
        "num_cpu_devices=1", "steps=10",
    ]
    runtime.initialize(pyconfig.initialize(COMMON))

    def losses(words):
        config = pyconfig.initialize([*COMMON, *words])
        setup = set_up(config, jax.devices()[:1])
        setup, program = compile_train(setup)
        rng = np.random.default_rng(0)
        values = []
        with jax.set_mesh(setup.mesh):
            programs = build_programs(setup, program, np.ones(config.vocab_size, np.int32))
            state = train_state.initialize(config, setup.numerics, setup.optimizer, setup.abstract)
            for _ in range(8):
                tokens = rng.integers(0, 300, (setup.plan.rows, config.max_target_length + 1), dtype=np.int32)
                batch = put_global(to_batch(tokens), sharding.batch_sharding(setup.mesh, config.logical_axis_rules))
                state, metrics = programs.train(state, batch)
                values.append(float(metrics["loss"]).hex())
        print(words, values, file=sys.stderr, flush=True)  # a crash has a name
        return values

    def kernels():
        [device] = jax.devices()[:1]
        return [
            name for name, row in attention.KERNELS.items()
            if device.platform in row.backends and not row.problem(device, "bfloat16", 128)
        ]

    def products():
        return ["xla", "pallas"] if jax.devices()[0].platform == "tpu" else []

    print(json.dumps({{" ".join(words): losses(words) for words in {runs}}}))
"""


def losses(runs: str, **environment: str) -> dict[str, list[float]]:
    """The losses of eight steps by the words of a run. runs: an expression, the words of each."""
    output = run(LOSSES.format(runs=runs), **environment)
    return {words: [float.fromhex(x) for x in found] for words, found in output.items()}


def test_deterministic_flags_give_the_same_losses_to_the_last_bit():
    """In two processes: each compiles and autotunes anew."""
    first, second = (losses('[["xla_flags=[deterministic]"]]') for _ in range(2))
    assert first == second
