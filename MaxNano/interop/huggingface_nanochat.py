"""Model folders of transformers' own NanoChatForCausalLM: names, config.json -> config keys.

It is nanochat of October 2025: no residual and x0 scalars, value embeddings, smear or backout, and
every layer sees the whole context.
Source: transformers 5.24, models/nanochat.
"""

from collections.abc import Mapping
from typing import Any

from MaxNano.interop.parameters import TensorNames

MODEL_TYPE = "nanochat"
_LAYER = "model.layers.{i}."
NAMES = TensorNames(
    token_embed="model.embed_tokens.weight",
    lm_head="lm_head.weight",
    query=_LAYER + "self_attn.q_proj.weight",
    key=_LAYER + "self_attn.k_proj.weight",
    value=_LAYER + "self_attn.v_proj.weight",
    out=_LAYER + "self_attn.o_proj.weight",
    wi=_LAYER + "mlp.fc1.weight",
    wo=_LAYER + "mlp.fc2.weight",
    # Of parameters that the model does not have:
    value_embeds="",
    value_gate="",
    resid_lambdas="resid_lambdas",
    x0_lambdas="x0_lambdas",
    smear_gate="",
    smear_lambda="",
    backout_lambda="",
    lambdas_are_optional=True,
)
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "emb_dim",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "num_decoder_layers",
    "num_attention_heads": "num_query_heads",
    "max_position_embeddings": "max_target_length",
}


def config_values(content: Mapping[str, Any]) -> dict[str, Any]:
    """The config keys that a config.json decides.

    A field that is missing has transformers' default. Raises ValueError for a missing or wrong
    size, and for an option that MaxNano's model does not have.
    """
    for field in SIZES:
        if type(content.get(field)) is not int or content[field] < 1:
            raise ValueError(f"{field} is {content.get(field)!r}")
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    only = {"hidden_act": "relu2", "attention_bias": False, "tie_word_embeddings": False}
    options = {field: content.get(field, value) for field, value in only.items()}
    options["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    for field, value in (only | {"rope_type": "default"}).items():
        if options[field] != value:
            raise ValueError(f"{field} is {options[field]!r}: MaxNano's model has only {value!r}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not 1: MaxNano's model rotates whole heads")
    heads = content["num_attention_heads"]
    return {
        **{key: content[field] for field, key in SIZES.items()},
        "num_kv_heads": content.get("num_key_value_heads") or heads,
        "head_dim": content.get("head_dim") or content["hidden_size"] // heads,
        "rope_theta": float(rope.get("rope_theta") or content.get("rope_theta") or 10000.0),
        "norm_epsilon": float(content.get("rms_norm_eps", 1e-6)),
        "logits_soft_cap": float(content.get("final_logit_softcapping", 15.0) or 0.0),
        "qk_norm_scale": 1.0,
        "window_pattern": "L",
        "value_embed_gate_channels": 0,
        "smear_gate_channels": 0,
        "use_backout": False,
    }
