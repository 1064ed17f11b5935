"""The MaxNano model for Hugging Face transformers: nanochat's architecture, as MaxNano trains it.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

RMS norms have no weights. Queries and keys are rotated, normalized and scaled; layers see windows of the past. Every
second layer adds a gated embedding of the token to its values. A gate mixes the previous token's embedding into each
token's (smear). Before each layer the first embedding is mixed in again, and before the last norm a fraction of the
middle layer's output is subtracted (backout).

Legend: B batch, L length, P positions that are known (cached ones and L new ones), D hidden_size, H head_dim.
"""

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (4, 57):
    raise ImportError(f"this model needs transformers 4.57 or newer, not {transformers.__version__}")

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_maxnano import MaxNanoConfig

# The KV cache is called `cache` since transformers 5.24, `past_key_values` before.
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"


def given_cache(arguments):
    """The cache among the arguments of a forward pass by either name, or None.

    Raises ValueError for a cache by another name or of another kind: ignored or misread, it would generate other text.
    """
    names = [name for name, value in arguments.items() if isinstance(value, Cache)]
    if len(names) > 1 or not {*names} <= {"cache", "past_key_values"}:
        raise ValueError(f"this model takes one cache, as cache or past_key_values, not {names}: pass use_cache=False")
    cache = arguments[names[0]] if names else None
    if cache is not None and not isinstance(cache, DynamicCache):
        raise ValueError(f"this model takes a DynamicCache, not a {type(cache).__name__}: leave cache_implementation out")
    return cache


def rms_norm(x, eps):
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 inside."""
    x32 = x.float()
    return (x32 / torch.sqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def mix(x, scale, other, share):
    """scale x + share other, in float32 inside."""
    return (scale * x.float() + share * other.float()).to(x.dtype)


def rotary(position_ids, config):
    """Cosines and sines (B, 1, L, H / 2) in float32, which half precision could not hold."""
    exponents = -torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu") / config.head_dim
    frequencies = (config.rope_theta**exponents).float().to(position_ids.device)
    angles = position_ids[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x (B, heads, L, H) with its halves turned by minus the position's angle."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).to(x.dtype)


def visible_positions(new, kept, known, window, attention_mask, device):
    """Which of the `kept` last of `known` positions each of the `new` last ones sees: (B or 1, 1, new, kept) bool."""
    query = torch.arange(known - new, known, device=device)[:, None]
    key = torch.arange(known - kept, known, device=device)[None, :]
    visible = ((key <= query) & (key >= query - window))[None, None]
    if attention_mask is not None:
        is_token = attention_mask[:, None, None, known - kept : known].bool()
        # Padding sees itself: a softmax over nothing would spread NaN.
        visible = (visible & is_token) | (key == query)
    return visible


class MaxNanoAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.window = config.windows[layer_idx]
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        if config.has_value_embedding(layer_idx):
            self.value_embed = nn.Embedding(config.padded_vocab_size, keys)
            self.value_gate = nn.Linear(config.value_gate_channels, config.num_key_value_heads, bias=False)

    def forward(self, x, input_ids, cos_sin, attention_mask, known, past_key_values):
        """x (B, L, D), normalized -> (B, L, D)."""
        config = self.config
        batch, new, _ = x.shape

        def heads(y):
            return y.view(batch, new, -1, config.head_dim).transpose(1, 2)

        q, k = (
            config.qk_norm_scale * rms_norm(rotate(heads(project(x)), *cos_sin), config.rms_norm_eps)
            for project in (self.q_proj, self.k_proj)
        )
        v = heads(self.v_proj(x))
        if config.has_value_embedding(self.layer_idx):
            gate = self.value_gate(x[..., : config.value_gate_channels]).float().sigmoid()
            gate = config.value_gate_range * gate.transpose(1, 2)[..., None]
            v = (v.float() + gate * heads(self.value_embed(input_ids)).float()).to(v.dtype)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        visible = visible_positions(new, k.shape[2], known, self.window, attention_mask, x.device)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, enable_gqa=config.num_key_value_heads != config.num_attention_heads
        )
        return self.o_proj(y.transpose(1, 2).reshape(batch, new, -1))


class MaxNanoMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.relu(self.up_proj(x)).square())


class MaxNanoDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = MaxNanoAttention(config, layer_idx)
        self.mlp = MaxNanoMLP(config)

    def forward(self, x, *context):
        x = x + self.self_attn(rms_norm(x, self.eps), *context)
        return x + self.mlp(rms_norm(x, self.eps))


class MaxNanoPreTrainedModel(PreTrainedModel):
    config_class = MaxNanoConfig
    base_model_prefix = "model"
    _no_split_modules = ["MaxNanoDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # Trained in float32, for any dtype of the matrices.
    _keep_in_fp32_modules_strict = ["resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"]

    def __init__(self, config):
        super().__init__(config)
        # transformers 4 refuses a name that the model does not have.
        missing = {"smear_lambda": not config.smear_gate_channels, "backout_lambda": not config.use_backout}
        names = [name for name in self._keep_in_fp32_modules_strict if not missing.get(name)]
        self._keep_in_fp32_modules_strict = names


class MaxNanoModel(MaxNanoPreTrainedModel):
    """Token ids -> normalized final hidden states."""

    def __init__(self, config):
        super().__init__(config)
        depth = config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MaxNanoDecoderLayer(config, i) for i in range(depth)])
        self.resid_lambdas = nn.Parameter(torch.ones(depth))
        self.x0_lambdas = nn.Parameter(torch.zeros(depth))
        if config.smear_gate_channels:
            self.smear_gate = nn.Linear(config.smear_gate_channels, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.use_backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        inputs_embeds=None,
        cache=None,
        **kwargs,
    ):
        """attention_mask (B, P): 0 for padding, on either side. input_ids (B, L) are the new tokens alone."""
        past_key_values = given_cache({"cache": cache, "past_key_values": past_key_values, **kwargs})
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("this model takes input_ids, not inputs_embeds: its values are embeddings of tokens too")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("attention_mask must be (batch, length), 0 for padding")
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        known = past + input_ids.shape[1]
        if attention_mask is not None and attention_mask.shape[1] != known:
            # A cache that did not arrive would otherwise generate other text.
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} positions, cache and input_ids {known}: pass use_cache=False"
            )
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(past, known, device=input_ids.device)[None]
            else:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:known]

        x = rms_norm(self.embed_tokens(input_ids), config.rms_norm_eps)
        if config.smear_gate_channels:
            x = self.smear(x, input_ids, position_ids, past_key_values)
        x0 = middle = x
        cos_sin = rotary(position_ids, config)
        for i, layer in enumerate(self.layers):
            x = mix(x, self.resid_lambdas[i], x0, self.x0_lambdas[i])
            x = layer(x, input_ids, cos_sin, attention_mask, known, past_key_values)
            if i == config.num_hidden_layers // 2:
                middle = x
        if config.use_backout:
            x = mix(x, 1.0, middle, -self.backout_lambda)
        return BaseModelOutputWithPast(
            last_hidden_state=rms_norm(x, config.rms_norm_eps),
            **{CACHE: past_key_values if use_cache else None},
        )

    def smear(self, x, input_ids, position_ids, past_key_values):
        """x (B, L, D) plus a gated fraction of the previous token's embedding; the first token has no previous token.

        The cache has an extra layer with token ids, so that they are cropped, reordered and repeated together with
        keys and values.
        """
        seen = input_ids
        if past_key_values is not None:
            index = self.config.num_hidden_layers
            while len(past_key_values.layers) <= index:
                past_key_values.layers.append(DynamicLayer())
            ids = input_ids[:, None, :, None]
            seen = past_key_values.update(ids, ids, index)[0][:, 0, :, 0]
        before = F.pad(seen, (1, 0))[:, -1 - input_ids.shape[1] : -1]
        previous = rms_norm(self.embed_tokens(before), self.config.rms_norm_eps)
        gate = self.smear_gate(x[..., : self.config.smear_gate_channels]).sigmoid()
        gate = (self.smear_lambda * gate * (position_ids > 0)[..., None]).to(x.dtype)
        return x + gate * previous


class MaxNanoForCausalLM(MaxNanoPreTrainedModel, GenerationMixin):
    """The model with its head: logits of the next token, in float32."""

    def __init__(self, config):
        super().__init__(config)
        self.model = MaxNanoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ):
        """labels (B, L): the input ids, -100 for positions without loss; the loss is that of the next token."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=given_cache({"cache": cache, "past_key_values": past_key_values, **kwargs}),
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])[..., : self.config.vocab_size].float()
        if cap := self.config.logits_soft_cap:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: outputs[CACHE] if CACHE in outputs else None})
