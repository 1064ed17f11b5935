"""Every attention kernel computes the definition: softmax over the last window + 1 keys."""

import functools
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from MaxNano import pyconfig
from MaxNano.models import attention

ROOT = Path(__file__).resolve().parents[1]
RULES = (("activation_batch", "data", "fsdp"), ("activation_heads", "tensor"))
SETTINGS = attention.KernelSettings(
    chunk=16,
    splash_long_forward=(256, 256, 128),
    splash_long_backward=(128, 256, 128),
    splash_short_window=200,
    splash_short_forward=(128, 256, 256),
    splash_short_backward=(256, 128, 128),
    splash_fused_backward=True,
    flash_block=128,
    interpret=True,
)
WIDE = SETTINGS._replace(chunk=96)  # for long rows: fewer blocks to compile
# Cheap on a CPU; splash is interpreted there and has its own tests.
ANYWHERE = ("reference", "chunked")
# float32; measured: 1e-6 in outputs, 8e-6 in gradients that sum 512 products of either sign.
TOLERANCE = 2e-5


@functools.partial(jax.jit, static_argnames=("window", "kernel", "settings"))
def attend(q, k, v, window, kernel, settings=SETTINGS):
    return attention.attention(
        q, k, v, window=window, kernel=kernel, settings=settings, rules=RULES
    )


def by_definition(q, k, v, window):
    """Loops and float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    batch, heads, length, head_dim = q.shape
    group = heads // k.shape[1]
    for b, n, t in np.ndindex(batch, heads, length):
        seen = slice(max(0, t - window), t + 1)
        scores = k[b, n // group, seen] @ q[b, n, t] / head_dim**0.5
        weights = np.exp(scores - scores.max())
        out[b, n, t] = weights @ v[b, n // group, seen] / weights.sum()
    return out


def inputs(length, heads, kv_heads, head_dim=8, batch=2):
    rng = np.random.default_rng(length)
    return [
        rng.standard_normal((batch, n, length, head_dim), dtype=np.float32)
        for n in (heads, kv_heads, kv_heads)
    ]


@functools.partial(jax.jit, static_argnames=("window", "kernel", "settings"))
def output_and_gradients(arrays, window, kernel, settings=SETTINGS):
    """The output and its gradients by q, k and v; every row and head of the output is weighted
    alike.
    """
    out, pull = jax.vjp(lambda *qkv: attend(*qkv, window, kernel, settings), *arrays)
    weight = jnp.sin(jnp.arange(out[0, 0].size, dtype=out.dtype)).reshape(out.shape[2:])
    return out, *pull(jnp.broadcast_to(weight, out.shape))


@pytest.mark.parametrize("kernel", ANYWHERE)
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("length, window", [(37, 37), (37, 8), (37, 0), (16, 3), (5, 100)])
def test_kernel_equals_definition(kernel, heads, kv_heads, length, window):
    arrays = inputs(length, heads, kv_heads)
    np.testing.assert_allclose(
        attend(*arrays, window, kernel), by_definition(*arrays, window), atol=1e-5
    )


@pytest.mark.parametrize("window", [40, 8, 5])
def test_gradients_of_chunked_equal_reference(window):
    arrays = inputs(40, 4, 2)
    expected = output_and_gradients(arrays, window, "reference")
    for got, wanted in zip(output_and_gradients(arrays, window, "chunked"), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "length, window, heads, kv_heads, fused",
    [
        (128, 127, 1, 1, True),  # one block
        (256, 256, 4, 2, True),  # the whole context, in blocks
        (256, 128, 3, 1, False),  # a window of whole blocks needs one key more
        (512, 250, 2, 1, False),  # a window that takes the long blocks
        (512, 100, 2, 2, True),  # blocks that nothing sees
        (200, 60, 4, 2, True),  # padded
    ],
)
def test_splash_equals_reference_with_gradients(length, window, heads, kv_heads, fused):
    arrays = inputs(length, heads, kv_heads, batch=1)
    settings = SETTINGS._replace(splash_fused_backward=fused)
    expected = output_and_gradients(arrays, window, "reference")
    for got, wanted in zip(
        output_and_gradients(arrays, window, "splash", settings), expected, strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=TOLERANCE)


@pytest.mark.parametrize("kernel", [*ANYWHERE, "splash"])
def test_a_window_sees_the_position_and_exactly_its_predecessors(kernel):
    window, position = 128, 300
    q, k, v = inputs(384, 1, 1, batch=1)
    row = attend(q, k, v, window, kernel, WIDE)[0, 0, position]
    for key, seen in [(-window, True), (-window - 1, False), (0, True), (1, False)]:
        other = v.copy()
        other[0, 0, position + key] += 1e3
        changed = attend(q, k, other, window, kernel, WIDE)[0, 0, position]
        assert np.any(np.asarray(changed) != row) == seen, f"key t{key:+}"


@pytest.mark.parametrize("length", [128, 384, 2048, 2176])
@pytest.mark.parametrize("window", [512, 2047])
def test_splash_blocks_divide_any_length(length, window):
    config = pyconfig.initialize(["configs/base.yml"])
    sizes = attention.splash_blocks(length, window, attention.KernelSettings.from_config(config))
    assert (
        length % sizes.block_q
        == length % sizes.block_kv
        == sizes.block_kv % sizes.block_kv_compute
        == 0
    )
    assert length % sizes.block_q_dkv == length % sizes.block_kv_dkv == 0
    assert sizes.block_kv_dkv % sizes.block_kv_dkv_compute == 0


def test_windows_take_their_own_blocks():
    short, long = (attention.splash_blocks(512, window, SETTINGS) for window in (200, 201))
    assert (short.block_q, short.block_kv, short.block_kv_compute) == (128, 256, 256)
    assert (long.block_q_dkv, long.block_kv_dkv, long.block_kv_dkv_compute) == (128, 256, 128)


@pytest.mark.parametrize("kernel", [*ANYWHERE, "splash"])
def test_output_has_the_dtype_of_the_queries(kernel):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(12, 2, 2))
    assert attend(q, k, v, 4, kernel).dtype == jnp.bfloat16


def test_unknown_kernel_names_the_choices():
    with pytest.raises(ValueError, match="reference"):
        attend(*inputs(4, 1, 1), 1, "nonsense")


def device(platform, capability="9.0"):
    return SimpleNamespace(
        platform=platform, device_kind="Some chip", compute_capability=capability
    )


def resolve(kernel, platform, capability="9.0", dtype="bfloat16", head_dim=128):
    return attention.resolve(kernel, device(platform, capability), dtype=dtype, head_dim=head_dim)


def test_auto_picks_a_kernel_that_runs_on_the_device():
    auto = {platform: resolve("auto", platform) for platform in ("cpu", "gpu", "tpu")}
    assert auto == {"cpu": "chunked", "gpu": "cudnn", "tpu": "flash"}
    assert resolve("splash", "cpu") == "splash"


@pytest.mark.parametrize(
    "values, problem",
    [
        ({"dtype": "float32"}, "supports bfloat16 and float16, not dtype=float32"),
        ({"capability": "7.5"}, "this Some chip has 7.5"),  # a T4
        (
            {"capability": "gfx942"},
            "but the device is a Some chip",
        ),  # AMD's name for an architecture
        ({"capability": "8.9", "head_dim": 256}, "up to 128 here, not 256"),
        ({"head_dim": 12}, "multiple of 8 up to 256 here, not 12"),
    ],
)
def test_where_cudnn_cannot_run_auto_takes_another_kernel_and_cudnn_is_refused(values, problem):
    assert resolve("auto", "gpu", **values) == "chunked"
    with pytest.raises(
        ValueError, match=f"attention=cudnn .*{problem}: choose attention=auto"
    ) as error:
        resolve("cudnn", "gpu", **values)
    assert "\n" not in str(error.value)


def test_kernels_that_a_backend_does_not_have_are_refused():
    for kernel, backend in [
        ("cudnn", "cpu"),
        ("cudnn", "tpu"),
        ("splash", "gpu"),
        ("flash", "gpu"),
        ("nonsense", "cpu"),
    ]:
        with pytest.raises(ValueError, match=f"attention={kernel}") as error:
            resolve(kernel, backend)
        assert "\n" not in str(error.value)


def test_a_kernel_is_a_function_and_a_row(monkeypatch):
    """One row makes a kernel known to the config's resolution, to the model's attention and to
    prefill.
    """

    def mean_of_values(q, k, v, window, settings, rules):
        return jnp.broadcast_to(v.mean(2, keepdims=True), q.shape)

    monkeypatch.setitem(attention.KERNELS, "mean", attention.Kernel(mean_of_values, ("cpu",)))
    assert resolve("mean", "cpu") == "mean"
    with pytest.raises(ValueError, match="attention=mean is a CPU kernel, but the backend is gpu"):
        resolve("mean", "gpu")
    q, k, v = inputs(8, 2, 2)
    expected = np.broadcast_to(v.mean(2, keepdims=True), q.shape)
    np.testing.assert_allclose(attend(q, k, v, 8, "mean"), expected, rtol=1e-6)
    qkv, _, _ = projected(8, 1, 2, head_dim=8)
    out = attention.attend(
        qkv,
        (np.ones((8, 4)), np.zeros((8, 4))),
        heads=attention.Heads(2, 1, 8, 1.0, 1e-6),
        window=8,
        kernel="mean",
        settings=SETTINGS,
        rules=RULES,
    )
    values = qkv.reshape(2, 8, 2, 3, 8)[:, :, :, 2].mean(1)
    np.testing.assert_allclose(out[:, 0].reshape(2, 2, 8), values, rtol=1e-5)


def test_the_config_names_every_kernel():
    for kernel in ("auto", *attention.KERNELS):
        pyconfig.initialize(["configs/base.yml", f"attention={kernel}"])


def test_prefill_replaces_a_kernel_that_takes_fused_projections():
    arrays = inputs(128, 2, 1, head_dim=128, batch=1)
    np.testing.assert_array_equal(attend(*arrays, 100, "flash"), attend(*arrays, 100, "splash"))


def projected(length, group, kv_heads, head_dim=128, batch=2):
    """What the model's attention takes: qkv as projected, rows of value embeddings and their gates."""
    rng = np.random.default_rng(0)
    shapes = (
        (batch, length, kv_heads * (group + 2) * head_dim),
        (batch, length, kv_heads * head_dim),
        (batch, kv_heads, length),
    )
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("window", "kernel"))
def attended_and_gradients(arrays, window, kernel, head_dim=128):
    """As output_and_gradients, of the model's attention with rotary embedding, QK norm and value
    embeddings.
    """
    heads = arrays[2].shape[1]
    angles = jnp.arange(arrays[0].shape[1])[:, None] * jnp.logspace(0, -3, head_dim // 2)
    attended = functools.partial(
        attention.attend,
        tables=(jnp.cos(angles), jnp.sin(angles)),
        heads=attention.Heads(heads, arrays[0].shape[2] // (heads * head_dim) - 2, 128, 1.2, 1e-6),
        window=window,
        kernel=kernel,
        settings=WIDE,
        rules=RULES,
    )
    out, pull = jax.vjp(lambda qkv, *embeds: attended(qkv, value_embed=embeds), *arrays)
    weight = jnp.sin(jnp.arange(out.shape[1] * 128, dtype=out.dtype)).reshape(-1, 128)
    weight = jnp.tile(weight, (1, out.shape[2] // 128))
    return out, *pull(jnp.broadcast_to(weight, out.shape))


@pytest.mark.parametrize("kernel", ["chunked", "splash", "flash"])
def test_the_model_attends_alike_by_every_kernel(kernel):
    arrays = projected(256, 2, 2, batch=1)
    expected = attended_and_gradients(arrays, 100, "reference")
    for got, wanted in zip(attended_and_gradients(arrays, 100, kernel), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=TOLERANCE)


MESH_PROGRAM = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests import test_attention as t

mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
rows = P(("data", "fsdp"))


def splash(*arrays):
    return t.output_and_gradients(arrays, 100, "splash")


def flash(*arrays):
    return t.attended_and_gradients(arrays, 100, "flash")


def within_manual_axes(*arrays):
    over = dict(in_specs=rows, out_specs=rows, axis_names={"data", "fsdp"}, check_vma=False)
    return jax.shard_map(splash, **over)(*arrays)


def check(program, arrays, expected, local_shape):
    placed = [jax.device_put(x, NamedSharding(mesh, rows)) for x in arrays]
    with jax.set_mesh(mesh):
        compiled = jax.jit(program).lower(*placed).compile()
    for got, wanted in zip(compiled(*placed), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=t.TOLERANCE, err_msg=program.__name__)
    assert local_shape in compiled.as_text(), "heads and rows are to be cut"


for program, heads, kv_heads, local_shape in [
    (splash, 4, 2, "f32[1,2,128,8]"),
    (splash, 2, 1, "f32[1,2,128,8]"),
    (within_manual_axes, 4, 2, "f32[1,2,128,8]"),
]:
    arrays = t.inputs(128, heads, kv_heads, batch=4)
    check(program, arrays, t.output_and_gradients(arrays, 100, "reference"), local_shape)
arrays = t.projected(128, 2, 2, batch=4)
check(flash, arrays, t.attended_and_gradients(arrays, 100, "reference"), "f32[1,128,512]")
print("equal")
"""


def test_kernels_on_a_mesh_of_eight():
    """Automatic axes, also where one kv head cannot be cut in two; and, as the train step calls it,
    within a shard_map that has made the batch axes manual."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    result = programs.run("-c", MESH_PROGRAM, env={**os.environ, "XLA_FLAGS": flags})
    assert result.stdout.strip() == "equal", result.stderr
