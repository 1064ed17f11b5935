"""scaling.py gives nanochat's figures for every depth, and counts other shapes rightly."""

import pytest

from MaxNano import pyconfig, scaling

# Depth, width, heads, parameters, matrices, value embeddings, scaling parameters, FLOPs per token,
# log2 of the batch, learning-rate scale, weight decay, steps at 12 and at 8 tokens per scaling
# parameter. Source: nanochat@92d63d4, scripts/base_train.py run for each depth with its defaults.
TABLE = [
    (
        4,
        256,
        2,
        36700242,
        3145776,
        16777216,
        11534384,
        80216496,
        18,
        "0.7071",
        "1.889903",
        528,
        352,
    ),
    (
        6,
        384,
        3,
        73531538,
        10616940,
        37748736,
        23199852,
        167510808,
        18,
        "0.7071",
        "0.939612",
        1062,
        708,
    ),
    (
        8,
        512,
        4,
        125829354,
        25166016,
        67108864,
        41943232,
        295699728,
        18,
        "0.7071",
        "0.519723",
        1920,
        1280,
    ),
    (
        12,
        768,
        6,
        286261730,
        84935088,
        150994944,
        110100912,
        759696048,
        19,
        "1.0000",
        "0.280000",
        2520,
        1680,
    ),
    (
        16,
        1024,
        8,
        536871738,
        201327360,
        268435456,
        234881792,
        1585451664,
        19,
        "1.0000",
        "0.131250",
        5376,
        3584,
    ),
    (
        20,
        1280,
        10,
        896533746,
        393217200,
        419430400,
        435160240,
        2886212784,
        20,
        "1.4142",
        "0.100188",
        4980,
        3320,
    ),
    (
        22,
        1408,
        11,
        1123157490,
        523371948,
        507510784,
        569509292,
        3763085976,
        20,
        "1.4142",
        "0.076553",
        6517,
        4345,
    ),
    (
        24,
        1536,
        12,
        1384122122,
        679478976,
        603979776,
        729810624,
        4775225616,
        20,
        "1.4142",
        "0.059738",
        8352,
        5568,
    ),
    (
        26,
        1664,
        13,
        1681786938,
        863897580,
        708837376,
        918423532,
        5991051288,
        20,
        "1.4142",
        "0.047470",
        10510,
        7007,
    ),
    (
        32,
        2048,
        16,
        2818575450,
        1610615808,
        1073741824,
        1677724672,
        10770991248,
        21,
        "2.0000",
        "0.036750",
        9600,
        6400,
    ),
]
BASE = str(pyconfig.BASE)
TINY = scaling.Shape(
    num_decoder_layers=3,
    emb_dim=8,
    mlp_dim=20,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=2,
    vocab_size=50,
    vocab_multiple=64,
    value_embed_gate_channels=5,
    smear_gate_channels=6,
    use_backout=True,
)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"d{row[0]}")
def test_every_depth_has_nanochats_figures(row):
    depth, width, heads, total, matrices, value_embeds, size, flops, log_batch, *rates = row
    # The null ones are for d24, whose file fixes both.
    words = [BASE, f"model=d{depth}", "global_batch_tokens=null", "steps=null"]
    config = pyconfig.initialize(words)
    short = pyconfig.initialize([*words, "target_param_data_ratio=8"])
    shape = scaling.shape_of(config)
    counts = scaling.parameter_counts(shape)

    assert (config.emb_dim, config.num_query_heads, config.num_kv_heads) == (width, heads, heads)
    assert counts.token_embed == counts.lm_head == 32768 * width
    assert (counts.total, counts.matrices, counts.value_embeds) == (total, matrices, value_embeds)
    assert (counts.scaling, counts.scalars) == (size, 2 * depth + 26)
    assert scaling.flops_per_token(shape, pyconfig.windows_of(config)) == flops
    assert config.global_batch_tokens == short.global_batch_tokens == 2**log_batch
    decay = config.weight_decay * config.weight_decay_scale
    assert [f"{config.learning_rate_scale:.4f}", f"{decay:.6f}", config.steps, short.steps] == rates


def test_run_1_has_the_steps_and_flops_of_nanochats_leaderboard():
    # nanochat/dev/LEADERBOARD.md, run 1: the same shape, window and gate as run 4.
    config = pyconfig.initialize(
        [BASE, "model=d24_run4", "target_param_data_ratio=12", "global_batch_tokens=524288"]
    )
    flops = scaling.flops_per_token(scaling.shape_of(config), pyconfig.windows_of(config))
    assert config.steps == 16704
    assert float(flops * config.steps * config.global_batch_tokens) == 4.330784131228946e19


def test_counts_cover_grouped_heads_odd_depth_padding_and_missing_parts():
    # By hand from the parameter tree: D 8, query heads 4 x 2, key heads 2 x 2, F 20, V 64.
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 2 * 8 * 20
    counts = scaling.parameter_counts(TINY)
    assert counts == (64 * 8, 2 * 64 * 4, 64 * 8, 3 * layer + 2 * 5 * 2, 2 * 3 + 7 + 1)
    assert scaling.flops_per_token(TINY, (4, 4, 9)) == 6 * (counts.scaling + 6) + 12 * 8 * 17

    plain = TINY._replace(value_embed_gate_channels=0, smear_gate_channels=0, use_backout=False)
    assert scaling.parameter_counts(plain) == (64 * 8, 0, 64 * 8, 3 * layer, 2 * 3)
    assert scaling.flops_per_token(plain, (9,) * 3) == 6 * (3 * layer + 512) + 12 * 8 * 27


def test_windows_tile_the_pattern_and_end_with_the_whole_context():
    assert scaling.window_sizes(6, "SSSL", 2048, 0.25, 128) == (512, 512, 512, 2048, 512, 2048)
    assert scaling.window_sizes(2, "S", 256, 0.25, 128) == (128, 256)
    assert scaling.window_sizes(2, "SL", 2048, 1 / 3, 128)[0] == 768
    assert scaling.window_sizes(2, "SL", 2048, 0.5, 128)[0] == 1024
    # 0.1 x 1280 is a little more than 128 in floats; one tile is meant.
    assert scaling.window_sizes(2, "S", 1280, 0.1, 128)[0] == 128
    # A tile longer than the context is the context.
    assert scaling.window_sizes(2, "S", 64, 0.25, 128) == (64, 64)
    assert scaling.window_sizes(1, "S", 64, 0.25, 16) == (64,)


def test_value_embeddings_are_on_every_second_layer_and_always_on_the_last():
    assert scaling.value_embed_layers(4, 12) == (1, 3)
    assert scaling.value_embed_layers(5, 12) == (0, 2, 4)
    assert scaling.value_embed_layers(1, 12) == (0,)
    assert scaling.value_embed_layers(4, 0) == ()


def test_the_reference_is_of_the_same_family():
    shape = scaling.shape_of(
        pyconfig.initialize([BASE, "model=d24", "num_kv_heads=4", "mlp_dim=3072"])
    )
    reference = scaling.reference_shape(shape, 64)
    assert (reference.num_decoder_layers, reference.emb_dim, reference.mlp_dim) == (12, 768, 1536)
    assert (reference.num_query_heads, reference.num_kv_heads) == (6, 2)
    # A depth-12 model is its own reference, whatever its heads.
    config = pyconfig.initialize([BASE, "model=d12", "num_kv_heads=2", "vocab_size=50304"])
    assert config.global_batch_tokens == 2**19
    assert config.weight_decay_scale == pytest.approx(1, abs=1e-8)


def test_a_config_saved_before_an_architecture_key_existed_means_its_first_value(monkeypatch):
    saved = pyconfig.initialize([BASE]).to_dict()
    keys = {**scaling.ARCHITECTURE_KEYS, "mlp_activation": "relu2"}
    monkeypatch.setattr(scaling, "ARCHITECTURE_KEYS", keys)
    assert scaling.architecture_of(saved)["mlp_activation"] == "relu2"
    saved["mlp_activation"] = "swiglu"
    assert scaling.architecture_of(saved)["mlp_activation"] == "swiglu"
    del saved["emb_dim"]
    with pytest.raises(ValueError, match="no emb_dim"):
        scaling.shape_of(saved)


def test_the_architecture_keys_are_config_keys_and_hold_the_shape():
    config = pyconfig.initialize([BASE])
    assert set(scaling.Shape._fields) <= scaling.ARCHITECTURE_KEYS.keys()
    assert scaling.ARCHITECTURE_KEYS.keys() | scaling.CONTEXT_KEYS.keys() <= set(config.keys())
    assert not scaling.ARCHITECTURE_KEYS.keys() & scaling.CONTEXT_KEYS.keys()


def test_steps_follow_from_flops_to_the_nearest_step():
    assert scaling.steps_for_flops(1e6, 100, 1000) == 10
    assert scaling.steps_for_flops(1.06e6, 100, 1000) == 11
    assert scaling.steps_for_flops(1.04e6, 100, 1000) == 10
