"""The configuration of a MaxNano model for Hugging Face transformers, which reads it from config.json.

This file and modeling_maxnano.py travel with the weights; MaxNano itself never imports them.
"""

import math

from transformers import PretrainedConfig


class MaxNanoConfig(PretrainedConfig):
    """Shape and options of the model; all of them are in config.json.

    vocab_multiple: tables are padded to a multiple of this many rows, padded logits are removed. window_pattern: tiled
    over the layers, S a short window, L the whole context; the last layer always has the whole context. A short window is
    short_window_fraction of the context, rounded up to short_window_multiple. value_gate_channels, smear_gate_channels:
    0 leaves value embeddings and smear out. logits_soft_cap: 0 leaves the logits as they are. chat_turns: whether
    the model was trained on conversations. step: training steps.
    """

    model_type = "maxnano"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=32768,
        vocab_multiple=64,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=128,
        max_position_embeddings=2048,
        window_pattern="SSSL",
        short_window_fraction=0.25,
        short_window_multiple=128,
        rope_theta=100000.0,
        qk_norm_scale=1.2,
        rms_norm_eps=1.1920929e-07,
        value_gate_channels=12,
        value_gate_range=3.0,
        smear_gate_channels=24,
        use_backout=True,
        logits_soft_cap=15.0,
        use_cache=True,
        chat_turns=False,
        step=0,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.vocab_multiple = vocab_multiple
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.window_pattern = window_pattern
        self.short_window_fraction = short_window_fraction
        self.short_window_multiple = short_window_multiple
        self.rope_theta = rope_theta
        self.qk_norm_scale = qk_norm_scale
        self.rms_norm_eps = rms_norm_eps
        self.value_gate_channels = value_gate_channels
        self.value_gate_range = value_gate_range
        self.smear_gate_channels = smear_gate_channels
        self.use_backout = use_backout
        self.logits_soft_cap = logits_soft_cap
        self.use_cache = use_cache
        self.chat_turns = chat_turns
        self.step = step
        # For the cache of transformers, which counts the query's position in a window; `windows` does not.
        is_short = [window < max_position_embeddings for window in self.windows]
        kwargs["layer_types"] = ["sliding_attention" if short else "full_attention" for short in is_short]
        kwargs["sliding_window"] = min(self.windows) + 1 if any(is_short) else None
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    @property
    def windows(self):
        """Per layer: the number of earlier positions that a token attends to."""
        length, multiple = self.max_position_embeddings, self.short_window_multiple
        short = min(length, multiple * math.ceil(round(length * self.short_window_fraction / multiple, 9)))
        pattern = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.num_hidden_layers - 1)]
        return [short if letter == "S" else length for letter in pattern] + [length]

    @property
    def padded_vocab_size(self):
        """Rows of the token tables."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def has_value_embedding(self, layer_idx):
        """Whether a layer adds an embedding of the token to its values: every second layer, the last included."""
        return bool(self.value_gate_channels) and (self.num_hidden_layers - 1 - layer_idx) % 2 == 0
