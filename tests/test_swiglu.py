"""One definition of the block: a SwiGLU MLP, put in one place, changes training, decoding, CORE and
all counts.
"""

import math

import jax
import numpy as np
import pytest
from test_core import check_shared_prefixes, few_shapes, shared_prefix_setup  # noqa: F401
from test_decode import FLOAT32, check_every_token
from test_model import random_params, small

from MaxNano import pyconfig, scaling
from MaxNano.models import layers
from MaxNano.models.setup import architecture
from MaxNano.models.transformer import residual_widths
from MaxNano.optimizers import groups


@pytest.fixture(autouse=True)
def swiglu_model(monkeypatch):
    matrices = {"gate": ("embed", "mlp"), "wi": ("embed", "mlp"), "wo": ("mlp", "embed")}
    monkeypatch.setitem(scaling.BLOCK, "mlp", matrices)
    monkeypatch.setattr(layers, "activation", lambda gate, hidden: jax.nn.silu(gate) * hidden)


def test_decoding_equals_the_full_forward():
    check_every_token("num_decoder_layers=5", "num_kv_heads=2")


def test_shared_prefixes_score_like_whole_rows(few_shapes):  # noqa: F811
    setup = shared_prefix_setup()
    params = random_params(setup.model)
    assert "gate" in params["layers"]["mlp"]
    check_shared_prefixes(setup, params)


def matrix_product_flops(jaxpr):
    """FLOPs of the products with weights, which have no batch dimensions, attention's scores do."""
    flops = 0
    for equation in jaxpr.eqns:
        inner = [x for x in equation.params.values() if hasattr(x, "jaxpr")]
        flops += sum(matrix_product_flops(x.jaxpr) for x in inner)
        if equation.primitive.name == "dot_general":
            (contracting, _), (batch, _) = equation.params["dimension_numbers"]
            lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            if not batch:
                flops += 2 * math.prod(out) * math.prod(lhs[i] for i in contracting)
    return flops


def test_counts_follow_the_definition():
    """FLOPs are those of the products that the traced model makes, parameters those that it
    declares.
    """
    config = small("num_decoder_layers=4", "vocab_size=64", "scan_layers=false", "mlp_dim=48")
    model = architecture(config, FLOAT32)
    shape = scaling.shape_of(config)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes))
    assert scaling.parameter_counts(shape).total == parameters
    counts = groups.count_parameters(model.shapes, groups.parameter_groups(config))
    assert sum(counts.values()) == parameters

    def logits(params, tokens):
        bound = model.bind(params)
        return bound.logits(bound(tokens))

    tokens = np.zeros((2, 64), np.int32)
    forward = matrix_product_flops(jax.make_jaxpr(logits)(model.shapes, tokens).jaxpr)
    assert scaling.flops_per_token(shape, (0,) * 4) == 3 * forward / tokens.size
    windows = pyconfig.windows_of(config)
    attention = scaling.flops_per_token(shape, windows) - scaling.flops_per_token(shape, (0,) * 4)
    assert attention == 12 * 32 * sum(windows)
    assert residual_widths(config)["mlp_hidden"] == 2 * 48
