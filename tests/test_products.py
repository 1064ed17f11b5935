"""A layer's products in the TPU's kernels, interpreted, are those that the compiler makes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxNano import pyconfig, scaling
from MaxNano.distributed.mesh import make_mesh
from MaxNano.models import layers, products
from MaxNano.models.kernels import products as kernels

ROOT = Path(__file__).parents[1]
TOKENS, WIDTH, HIDDEN, QKV = 384, 256, 512, 768


def make_config(*overrides):
    return pyconfig.initialize([str(ROOT / "configs/base.yml"), "model=d4", *overrides])


def draw(*shapes):
    """Arrays whose rows differ much in size."""
    rng = np.random.default_rng(0)
    return [
        rng.standard_normal(shape) * 4.0 ** rng.uniform(-1, 1, (shape[0], 1)) for shape in shapes
    ]


def results(function, arrays, dtype):
    """What a function of arrays returns in a dtype, and all gradients, as float64."""
    arrays = [jnp.asarray(x, dtype if np.ndim(x) else jnp.float32) for x in arrays]

    @jax.jit
    def run(*arrays):
        out, pull = jax.vjp(function, *arrays)
        cotangents = [
            jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape).astype(x.dtype)
            for x in out
        ]
        return [*out, *pull(cotangents)]

    return [np.asarray(x, np.float64) for x in run(*arrays)]


def project(channels):
    def function(chosen, x, x0, scale, share, w):
        return list(chosen.project(x, x0, (scale, share), w, channels))

    shapes = (TOKENS, WIDTH), (TOKENS, WIDTH), (WIDTH, QKV)
    x, x0, w = draw(*shapes)
    return function, [x, x0, 0.9, 0.3, w / 16]


def add_product():
    def function(chosen, x, y, w):
        return [chosen.add_product(x, y, w)]

    x, y, w = draw((TOKENS, WIDTH), (TOKENS, QKV), (QKV, WIDTH))
    return function, [x, y, w / 16]


def mlp():
    def function(chosen, x, wi, wo):
        return [chosen.mlp(x, {"wi": wi, "wo": wo})]

    x, wi, wo = draw((TOKENS, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    return function, [x, wi / 16, wo / 16]


CASES = {
    "project": project(0),
    "project with channels": project(12),
    "add_product": add_product(),
    "mlp": mlp(),
}


def compare(case):
    """Float32 as the definition has it; bfloat16 as near to it as the definition in bfloat16."""
    function, arrays = case
    config = make_config()
    kernel = products.in_kernels(config, interpret=True)
    plain = products.plain(config, lambda x, w: jnp.matmul(x, w, precision="highest"))

    def run(chosen, dtype):
        return results(lambda *arrays: function(chosen, *arrays), arrays, dtype)

    exact = run(plain, jnp.float32)
    for one, other in zip(run(kernel, jnp.float32), exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max(initial=0))
    plain_in_bfloat16 = run(products.plain(config), jnp.bfloat16)
    for one, other, truth in zip(run(kernel, jnp.bfloat16), plain_in_bfloat16, exact, strict=True):
        if truth.ndim:  # the error of a single number says little
            error, plain_error = (np.linalg.norm(a - truth) for a in (one, other))
            assert error <= 1.1 * plain_error


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_the_definition(name):
    compare(CASES[name])


def test_an_mlp_in_parts_is_the_whole_one(monkeypatch):
    """Matrices that do not fit into VMEM."""
    monkeypatch.setattr(kernels, "MATRIX_BYTES", 2**18)
    matrices = [jax.ShapeDtypeStruct((WIDTH, HIDDEN), jnp.bfloat16)] * 2
    counts = [kernels.mlp_parts(matrices, backward=backward) for backward in (False, True)]
    assert counts == [2, 8]
    programs = kernels._mlp_forward, kernels._mlp_backward
    for program in programs:  # traced for one part
        program.clear_cache()
    try:
        compare(CASES["mlp"])
    finally:
        for program in programs:
            program.clear_cache()


def test_tiles_are_as_large_as_vmem_lets_them_be():
    def tokens(width, dtype):
        def array(*shape):
            return jax.ShapeDtypeStruct(shape, dtype)

        mlp = [array(width, 4 * width), array(4 * width, width)]
        project, out = array(width, 3 * width), array(width, width)
        if not kernels.fits(project, out, mlp):
            return None
        parts = kernels.mlp_parts(mlp, backward=True)
        return [
            kernels.tile_tokens("project_backward", [project]),
            kernels.tile_tokens("mlp_backward", mlp, parts),
        ]

    assert tokens(1536, jnp.bfloat16) == tokens(2048, jnp.bfloat16) == [512, 256]  # d24, d32
    assert tokens(2176, jnp.bfloat16) == [256, 256]  # d34
    assert tokens(3072, jnp.bfloat16) is None  # d48


def test_an_mlp_with_two_matrices_that_read(monkeypatch):
    """SwiGLU: two matrices in scaling.BLOCK, and an activation of two products."""
    matrices = {"gate": ("embed", "mlp"), "wi": ("embed", "mlp"), "wo": ("mlp", "embed")}
    monkeypatch.setitem(scaling.BLOCK, "mlp", matrices)
    monkeypatch.setattr(layers, "activation", lambda gate, hidden: jax.nn.silu(gate) * hidden)

    def function(chosen, x, gate, wi, wo):
        return [chosen.mlp(x, {"gate": gate, "wi": wi, "wo": wo})]

    x, gate, wi, wo = draw((TOKENS, WIDTH), (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    compare((function, [x, gate / 16, wi / 16, wo / 16]))


class Chip:
    """Stands for a device of a mesh."""

    def __init__(self, kind):
        self.device_kind, self.platform = kind, "gpu" if "NVIDIA" in kind else "tpu"


class Slice:
    """Stands for a mesh of several chips of a kind."""

    def __init__(self, kind, **axes):
        self.shape = {"data": 1, "fsdp": 1, "tensor": 1} | axes
        self.size = int(np.prod(list(self.shape.values())))
        self.axis_names = tuple(self.shape)
        self.devices = np.array([Chip(kind)])

    def __str__(self):
        return " ".join([self.devices[0].device_kind, *map(str, self.shape.values())])


V6E = "TPU v6 lite"


@pytest.mark.parametrize(
    ("mesh", "words", "expected"),
    [
        (Slice(V6E, data=8), ["head_dim=128"], "pallas"),
        (Slice(V6E, data=4, fsdp=2), ["head_dim=128"], "pallas"),
        (Slice(V6E, data=4, tensor=2), ["head_dim=128"], "xla"),
        (Slice(V6E), ["head_dim=128", "quantization=int8"], "xla"),
        (Slice(V6E), ["emb_dim=192", "head_dim=64"], "xla"),
        (Slice(V6E), ["head_dim=128", "max_target_length=192", "global_batch_tokens=19200"], "xla"),
        (Slice(V6E), ["model=d48"], "xla"),
        (Slice(V6E), ["model=d34"], "pallas"),
        (Slice(V6E), ["head_dim=128", "mlp_dim=1088"], "xla"),
        (Slice(V6E), ["head_dim=128", "value_embed_gate_channels=129"], "xla"),
        (Slice("TPU v5p"), ["head_dim=128"], "xla"),
        (Slice("NVIDIA H100 80GB HBM3"), ["head_dim=128"], "xla"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_where_the_kernels_are_the_default(mesh, words, expected):
    config = make_config(*words)
    assert products.resolve(config, mesh, "bfloat16") == expected
    assert products.resolve(config, mesh, "float32") == "xla"


@pytest.mark.parametrize(
    ("mesh", "words", "needs"),
    [
        (Slice(V6E, tensor=2), [], "data and fsdp as the only parallelism"),
        (Slice(V6E), ["quantization=int8"], "quantization=none"),
        (Slice(V6E), ["emb_dim=192", "head_dim=64"], "multiples of 128"),
        (Slice("NVIDIA H100 80GB HBM3"), [], "a TPU"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_kernels_that_cannot_be_are_refused(mesh, words, needs):
    config = make_config("head_dim=128", *words, "layer_products=pallas")
    with pytest.raises(ValueError, match=f"layer_products=pallas needs .*{needs}: choose"):
        products.resolve(config, mesh, "bfloat16")


def test_a_cpu_runs_them_only_if_asked():
    config = make_config("head_dim=128")
    mesh = make_mesh(config, jax.devices()[:1])
    assert products.resolve(config, mesh, "float32") == "xla"
    asked = make_config("head_dim=128", "layer_products=pallas")
    assert products.resolve(asked, mesh, "float32") == "pallas"
