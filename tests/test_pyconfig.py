"""pyconfig reads what it should, refuses the rest in one line, and knows where values came from."""

import math
import pickle
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from MaxNano import config_schema, pyconfig, scaling

ROOT = Path(__file__).resolve().parents[1]
BASE = str(ROOT / "configs" / "base.yml")
KEYS = config_schema.base_keys()
DEFAULTS = config_schema.default_values(KEYS, "base.yml")
MODEL_FILES = sorted((ROOT / "configs" / "models").glob("*.yml"))


def load(*words):
    return pyconfig.initialize([BASE, *words])


def refusal(*words, first=BASE):
    """The message with which these words are refused."""
    with pytest.raises(pyconfig.ConfigError) as caught:
        pyconfig.initialize([first, *words])
    message = str(caught.value)
    assert message.isprintable()
    return message


def model_folder(tmp_path, text, name="mine"):
    """A copy of base.yml with one model file beside it; its path."""
    (tmp_path / "models").mkdir(exist_ok=True)
    (tmp_path / "models" / f"{name}.yml").write_text(text)
    base = tmp_path / "base.yml"
    base.write_text(Path(BASE).read_text())
    return str(base)


# ---- Layers and origins -------------------------------------------------------------------------


def test_command_line_wins_over_stage_over_model_over_base(tmp_path):
    base = model_folder(
        tmp_path, "num_decoder_layers: 2\nseed: 1\nmatrix_lr: 0.1\nadam_epsilon: 1e-4\n"
    )
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "tune.yml").write_text("seed: 2\nmatrix_lr: 0.2\n")
    config = pyconfig.initialize([base, "model=mine", "stage=tune", "matrix_lr=0.3", "steps=1"])
    assert (config.adam_epsilon, config.seed, config.matrix_lr) == (1e-4, 2, 0.3)
    keys = ("scalar_lr", "adam_epsilon", "seed", "matrix_lr", "model", "emb_dim")
    assert [config.origin[key] for key in keys] == [
        "base",
        "mine.yml",
        "tune.yml",
        "command line",
        "command line",
        "derived",
    ]


@pytest.mark.parametrize("depth", range(2, 36, 2))
def test_every_even_depth_needs_no_file(depth):
    config = load(f"model=d{depth}")
    assert config.num_decoder_layers == depth
    assert config.emb_dim == math.ceil(depth / 2) * 128
    assert config.run_name == f"d{depth}"


def test_a_given_depth_wins_over_the_models_name():
    assert load("model=d8", "num_decoder_layers=2").num_decoder_layers == 2
    assert load("model=d24", "num_decoder_layers=2").num_decoder_layers == 2


def test_the_last_of_two_words_for_a_key_wins():
    assert load("steps=1", "steps=2").steps == 2


def test_every_key_is_there_and_those_of_the_backend_stay_null():
    config = load()
    assert set(pyconfig.keys_of(config)) == set(KEYS)
    open_keys = {
        "dtype",
        "embedding_dtype",
        "muon_dtype",
        "per_device_batch_size",
        "vocab_chunk_size",
    }
    open_keys |= {"num_cpu_devices", "ici_data_parallelism", "ici_fsdp_parallelism"}
    open_keys |= {"jax_cache_dir", "scan_layers", "remat_layers"}
    open_keys |= {"data_workers"}
    open_keys |= {"coordinator_address", "num_processes", "process_id"}
    asked = {
        "stage",
        "target_flops",
        "dataset_name",
        "from_nanochat",
        "to_nanochat",
        "compile_report",
    }
    asked |= {
        "from_huggingface",
        "to_huggingface",
        "serve_cors_origin_regex",
        "serve_allowed_hosts",
    }
    asked |= {
        "download_shards",
        "hub_url",
        "chat_data",
        "chat_word_list",
        "core_batch_tokens",
        "step",
    }
    asked |= {
        "decode_max_length",
        "prefill_rows",
        "chat_turns",
        "prompt",
        "load_from",
        "chat_slots",
        "rl_row_tokens",
        "eval_tokens",
    }
    assert {key for key in pyconfig.keys_of(config) if config[key] is None} == open_keys | asked


def test_config_is_frozen_hashable_and_survives_pickle():
    config = load("model=d6", "trackers=[wandb]")
    with pytest.raises(AttributeError):
        config.steps = 3
    assert hash(config) == hash(load("model=d6", "trackers=[wandb]"))
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.trackers == ("wandb",)
    assert config.logical_axis_rules[0] == ("layers", "data")


def test_describe_lists_what_differs_from_base_in_its_order():
    rows = pyconfig.describe(load("model=d24", "seed=42", "steps=9", "muon_beta2=0.5"))
    table = {key: (value, origin) for key, value, origin in rows}
    assert table["steps"] == (9, "command line")
    assert table["global_batch_tokens"] == (524288, "d24.yml")
    assert table["mlp_dim"] == (6144, "derived")
    assert "seed" not in table  # given, but the same
    assert [key for key, _, _ in rows] == [key for key in KEYS if key in table]


def test_replace_keeps_the_rest_and_names_its_origin():
    config = load()
    new = pyconfig.replace(config, "backend", dtype="float32")
    assert (new.dtype, new.origin["dtype"]) == ("float32", "backend")
    assert (new.seed, new.origin["seed"]) == (42, "base")
    assert ("dtype", "float32", "backend") in pyconfig.describe(new)
    with pytest.raises(KeyError):
        pyconfig.replace(config, "backend", dtypo="float32")


# ---- Horizon ------------------------------------------------------------------------------------


def test_steps_win_over_flops_and_flops_over_ratio():
    flops = 10 * 80216496 * 2**18
    assert load(f"target_flops={flops}").steps == 10
    assert load(f"target_flops={flops}", "steps=3").steps == 3
    # Batch and weight decay come from the ratio all the same.
    assert load("steps=3").weight_decay_scale == load().weight_decay_scale
    assert load("steps=3").global_batch_tokens == load().global_batch_tokens


def test_a_given_batch_need_not_be_a_power_of_two():
    config = load("global_batch_tokens=6144")
    assert config.learning_rate_scale == math.sqrt(6144 / 2**19)
    assert config.steps == 12 * 11534384 // 6144


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_every_model_file_builds_and_says_what_it_costs(path):
    config = load(f"model={path.stem}")
    assert config.run_name == path.stem
    head = path.read_text().split("\n\n")[0]
    assert all(word in head for word in (f"model={path.stem} ", "Cost:", "Expected:"))
    # A model file holds what differs from base.yml and nothing else.
    assert not {key for key in yaml.safe_load(path.read_text()) if config[key] == DEFAULTS[key]}


# Steps, batch, scaling parameters, FLOPs per token, short window.
# Source: nanochat's dev/LEADERBOARD.md (ratios), and its base_train.py at each commit.
RUNS = {
    "d24": (16704, 2**19, 729810624, 4775225616, 512),
    "d24_speedrun": (5568, 2**20, 729810624, 4775225616, 512),
    "d24_run6": (5568, 2**20, 729810624, 4775225616, 512),
    "d24_run5": (6055, 2**20, 729810624, 4860160128, 768),
    "d24_run4": (6612, 2**20, 729813504, 4945112064, 1024),
}


@pytest.mark.parametrize("model", RUNS)
def test_recorded_runs(model):
    config = load(f"model={model}")
    shape, windows = scaling.shape_of(config), pyconfig.windows_of(config)
    size = scaling.parameter_counts(shape).scaling
    flops = scaling.flops_per_token(shape, windows)
    figures = (config.steps, config.global_batch_tokens, size, flops, min(windows))
    assert figures == RUNS[model]
    assert windows == (*[min(windows)] * 3, 2048) * 6


# ---- What YAML would get wrong ------------------------------------------------------------------


def test_exponents_without_a_dot_are_numbers(tmp_path):
    base = model_folder(tmp_path, "num_decoder_layers: 2\nmatrix_lr: 1e-4\nsteps: 1e3\n")
    config = pyconfig.initialize([base, "model=mine", "scalar_lr=2e-3", "seed=1e9"])
    assert (config.matrix_lr, config.steps) == (1e-4, 1000)
    assert (config.scalar_lr, config.seed) == (2e-3, 10**9)
    assert type(config.seed) is int


def test_an_int_is_a_float_where_a_float_is_due():
    value = load("matrix_lr=1").matrix_lr
    assert (value, type(value)) == (1.0, float)


@pytest.mark.parametrize("word", ["null", "~", "Null", "NULL", "None"])
def test_null_in_every_spelling(tmp_path, word):
    base = model_folder(tmp_path, f"num_decoder_layers: 2\nrun_name: {word}\n")
    assert pyconfig.initialize([base, "model=mine", f"stage={word}"]).run_name == "mine"
    assert "does not allow" in refusal(f"text_column={word}")


def test_words_stay_words_where_a_word_is_due():
    config = load("text_column=no", "tracker_project=1e5", "run_name=007", 'dataset_path="null"')
    assert (config.text_column, config.tracker_project) == ("no", "1e5")
    assert (config.run_name, config.dataset_path) == ("007", "null")
    assert load("jax_cache_dir=", "dataset_path=gs://a/b=c #d").dataset_path == "gs://a/b=c #d"
    assert load("jax_cache_dir=").jax_cache_dir == ""


@pytest.mark.parametrize("text", ["seed: 1\nmatrix_lr: 1\nseed: 2\n", "seed: 1\n'seed': 1\n"])
def test_a_key_that_comes_twice_is_refused(tmp_path, text):
    message = refusal("model=mine", first=model_folder(tmp_path, text))
    assert "mine.yml" in message and "seed is already set in line 1" in message


def test_nothing_behind_the_equals_sign_is_not_null():
    assert "steps='' is not an int: it is empty" in refusal("steps=")


# ---- Refusals -----------------------------------------------------------------------------------

BAD_TEXT = """
steps=abc steps=1.5 steps=-1 steps=1e-4 steps=true steps=[1] steps={a:1} steps='"3"' steps=1_
steps=0x10 steps=1e400 steps=99999999999999999999 seed=null seed=-1 seed= dry_run=1 dry_run=maybe
dry_run=null dry_run="true" dry_run=[true] num_decoder_layers=0 num_decoder_layers=257
aspect_ratio=0 head_dim=3 head_dim=1 emb_dim=300 emb_dim=1 mlp_dim=0 num_query_heads=3
num_kv_heads=0 num_kv_heads=3 vocab_size=0 vocab_multiple=0 max_target_length=1
max_target_length=1000 max_target_length=4e18 window_pattern= window_pattern=SX window_pattern=sl
short_window_fraction=1.1 short_window_fraction=-0.1 short_window_fraction=nan
short_window_multiple=0 rope_theta=1 rope_theta=inf rope_theta=x qk_norm_scale=0
value_embed_gate_channels=-1 value_embed_gate_channels=257 smear_gate_channels=999
value_embed_gate_range=0 norm_epsilon=0 use_backout=2 logits_soft_cap=-1 embed_init_std=-0.1
head_init_std=.inf mlp_init_scale=one gate_init_max=-1 resid_lambda_init=1.0 resid_lambda_init=[1.0]
resid_lambda_init=[1,2,3] resid_lambda_init=[a,b] x0_lambda_init=[] x0_lambda_init=[[1,2]]
x0_lambda_init=null dtype=float16 dtype=bf16 embedding_dtype=float64 muon_dtype=int8 attention=flesh
attention_chunk=0 scan_layers=layers remat_policy=all vocab_chunk_size=-1 num_cpu_devices=0
mesh_axes=data mesh_axes=[data,data,fsdp,tensor] mesh_axes=[data,fsdp,expert] mesh_axes=[data,fsdp]
mesh_axes=[ mesh_axes=] mesh_axes={} dcn_data_parallelism=0 dcn_fsdp_parallelism=null num_processes=0
process_id=0 process_id=-1 coordinator_address=a:1 xla_flags=[vmemm] xla_flags=vmem
ici_data_parallelism=0 ici_fsdp_parallelism=0
ici_tensor_parallelism=two logical_axis_rules=[[vocab,tensr]] logical_axis_rules=[vocab]
logical_axis_rules=[[]] logical_axis_rules=[[vocab,tensor],[vocab,fsdp]]
logical_axis_rules=[[vocab,fsdp,fsdp]] tokenizer_type=gpt2 tokenizer_threads=0
tokenizer_train_characters=0 dataset_type=tfds dataset_type=csv dataset_splits=[train]
text_column=null data_readers=0 data_workers=-1 prefetch_batches=0 packing_buffer_documents=0
global_batch_tokens=100 global_batch_tokens=0 per_device_batch_size=0 target_flops=0 target_flops=-1
target_flops=1 target_flops=1e308000 target_param_data_ratio=0 target_param_data_ratio=-1
target_param_data_ratio=1e-320 target_param_data_ratio=1e308 target_param_data_ratio=0.001
learning_rate_scale=0 weight_decay_scale=-1 embedding_lr=-1 matrix_lr=1e-4x adam_epsilon=0
lm_head_betas=[0.8,1.2] lm_head_betas=[0.8,1] lm_head_betas=0.8 x0_betas=[0.9] x0_betas=[0.9,null]
weight_decay=-0.1 weight_decay_schedule=exponential muon_beta2=1.5 muon_iterations=0
muon_iterations=6 muon_norm_margin=0.9 warmup_steps=-1 warmdown_ratio=2 final_lr_fraction=-1
muon_momentum=1.01 eval_interval=-1 eval_tokens=0 checkpoint_keep=0 log_interval=0 trackers=wandb
trackers=[wanb] max_nonfinite_steps=0 run_name=../x run_name=.hidden run_name=a/b run_name=
model=../d4 model=null model= model=d0 model=d257 model=d99999999999 model=nosuch stage=nosuch
stage=../x stage= aspect_ratio=9223372036854775807 emb_dim=9223372036854775807 --steps=1 -steps=1
--dry_run steps =1 =1 = 1=2 origin=x steps.x=1 STEPS=1 a-b=1
"""
BAD_WORDS = BAD_TEXT.split()


@pytest.mark.parametrize("word", BAD_WORDS)
def test_a_malformed_word_is_one_line_and_status_2(word, capsys):
    def main(config):
        raise AssertionError("a malformed config must not start a run")

    assert pyconfig.launch(main, [BASE, word]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert "command line: " in err or "derived: " in err or "these sizes" in err


def test_there_are_enough_malformed_words():
    assert len(BAD_WORDS) > 150


def test_contradictions_name_both_sides():
    assert "emb_dim=512 does not fit: num_query_heads x head_dim = 3 x 128" in refusal(
        "emb_dim=512", "num_query_heads=3"
    )
    assert "num_kv_heads=3 does not divide num_query_heads=2" in refusal("num_kv_heads=3")
    assert "the nearest is 262000" in refusal("max_target_length=1000")
    assert "dataset_name" in refusal("dataset_type=tfds")
    assert "needs dataset_name" in refusal("dataset_type=hf")
    assert "exclude each other" in refusal("from_nanochat=a", "to_nanochat=b")
    assert "to_huggingface=b and from_nanochat exclude" in refusal(
        "from_nanochat=a", "to_huggingface=b"
    )
    assert "mesh_axes=[data] does not have fsdp" in refusal("mesh_axes=[data]")
    assert "needs fsdp in mesh_axes" in refusal(
        "mesh_axes=[data]", "logical_axis_rules=[]", "ici_fsdp_parallelism=2"
    )
    assert "needs tensor in mesh_axes" in refusal(
        "mesh_axes=[data]", "logical_axis_rules=[]", "dcn_tensor_parallelism=2"
    )


def test_the_place_of_a_process_is_whole_or_left_to_the_environment():
    whole = ("coordinator_address=10.0.0.1:8476", "num_processes=2", "process_id=1")
    assert load(*whole).process_id == 1
    assert "num_processes=2 needs coordinator_address and process_id" in refusal(whole[1])
    assert "coordinator_address=" in (message := refusal(*whole[:2])) and "process_id" in message
    assert "process_id=2 is out of range: the processes are numbered 0 to 1" in refusal(
        *whole, "process_id=2"
    )


GROUPS = "xla_flag_groups=[[fast, tpu, xla_a=1, xla_b=true], [slow, tpu, xla_a=2], [on_gpu, gpu, xla_a=3]]"


@pytest.mark.parametrize(
    "words, problem",
    [
        (
            ["xla_flags=[fats]", GROUPS],
            "names fats, which is not in xla_flag_groups; did you mean fast?",
        ),
        (["xla_flags=[fast,slow]", GROUPS], "sets xla_a twice: in fast and slow"),
        (["xla_flags=[fast,fast]", GROUPS], "sets xla_a twice"),
        (["xla_flag_groups=[[a,tpu,xla_x=1],[a,gpu,xla_y=1]]"], "two groups a"),
        (["xla_flag_groups=[[]]"], "a group without a name"),
        (["xla_flag_groups=[[a]]"], "group a that is not [name"),
        (["xla_flag_groups=[[a,tpu]]"], "group a that is not [name"),
        (["xla_flag_groups=[[a,npu,xla_x=1]]"], "group a that is not [name"),
        (["xla_flag_groups=[[a,tpu,--xla_x=1]]"], "--xla_x=1 in a, which is not xla_flag=value"),
        (["xla_flag_groups=[[a,tpu,xla_x]]"], "xla_x in a, which is not xla_flag=value"),
    ],
)
def test_flag_groups_that_cannot_be_used(words, problem):
    assert problem in refusal(*words)


def test_groups_of_different_backends_may_set_one_flag():
    assert load("xla_flags=[fast,on_gpu]", GROUPS).xla_flags == ("fast", "on_gpu")


def test_errors_name_the_file_they_come_from(tmp_path):
    assert refusal("model=mine", first=model_folder(tmp_path, "stepz: 1")).startswith("mine.yml: ")
    assert refusal("model=mine", first=model_folder(tmp_path, "steps: x")).startswith("mine.yml: ")
    text = "num_decoder_layers: 2\nhead_dim: 7\n"
    assert refusal("model=mine", first=model_folder(tmp_path, text)).startswith("mine.yml: ")


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "- 1",
        "just words",
        "\tx: 1",
        "a: 1\n---\nb: 2",
        "? [a]\n: 1",
        "{" * 1500,
        "a: &b *b",
        "model: d4",
        "stage: x",
        "seed: !!python/object:os.system {}",
        "\x00",
    ],
)
def test_malformed_files_are_one_line(tmp_path, text):
    base = model_folder(tmp_path, text)
    assert "mine.yml" in refusal("model=mine", first=base)
    (tmp_path / "run.yml").write_text(text)
    if "model" not in text:
        assert refusal(first=str(tmp_path / "run.yml"))


def test_first_argument_must_be_a_readable_file(tmp_path):
    (tmp_path / "latin.yml").write_bytes(b"run_name: \xe9\n")
    for first in (
        "model=d4",
        "--x",
        "missing.yml",
        str(tmp_path),
        str(tmp_path / "latin.yml"),
        "a\0b",
    ):
        assert refusal(first=first)
    with pytest.raises(pyconfig.ConfigError, match="configs/base.yml"):
        pyconfig.initialize([])


@pytest.mark.parametrize(
    "word, hint",
    [
        (f"{form}=4", key)
        for name, key in config_schema.OTHER_NAMES.items()
        for form in (name, "--" + name.replace("_", "-"))
    ],
)
def test_nanochats_flags_are_answered_with_the_key(word, hint):
    assert refusal(word).endswith(f"; write {hint}=VALUE")


def test_another_folder_is_named_as_the_reason():
    message = refusal(first="configs/none.yml")
    assert message.endswith("configs/none.yml does not exist; run this in MaxNano's folder")


def test_a_list_without_its_other_half_asks_for_quotes():
    assert refusal("trackers=[[a,").endswith(
        "; a bracket is missing: the shell needs quotes around a list"
    )


def test_unknown_model_names_its_nearest():
    assert "did you mean d24_speedrun" in refusal("model=d24_speedrn")
    assert "there are: d24, " in refusal("model=zzz")


def one_edit(word, draw):
    """`word` with one letter lost, added, changed, or swapped with the next."""
    i, letter = draw.randrange(len(word)), draw.choice(string.ascii_lowercase + "_")
    return draw.choice(
        [
            word[:i] + word[i + 1 :],
            word[:i] + letter + word[i:],
            word[:i] + letter + word[i + 1 :],
            word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :],
        ]
    )


def test_nine_of_ten_misspelled_keys_get_the_right_hint_first():
    draw = random.Random(0)
    right = total = 0
    for key in KEYS:
        for _ in range(6):
            wrong = one_edit(key, draw)
            if wrong in KEYS:
                continue
            with pytest.raises(pyconfig.ConfigError) as caught:
                config_schema.find_key(wrong, KEYS, "command line")
            total += 1
            right += f"did you mean {key}?" in str(caught.value) or f"mean {key} or" in str(
                caught.value
            )
    assert right >= 0.9 * total > 900


@settings(max_examples=40)
@given(st.lists(st.text(max_size=30), max_size=3))
def test_no_word_whatever_breaks_the_parser(words):
    try:
        pyconfig.initialize([BASE, *words])
    except pyconfig.ConfigError as error:
        assert "\n" not in str(error)


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(KEYS)),
    st.text(max_size=20) | st.from_regex(r"[\[\]{}\"',:0-9eE.-]{0,12}"),
)
def test_no_value_whatever_breaks_the_parser(name, text):
    try:
        config = load(f"{name}={text}")
    except pyconfig.ConfigError as error:
        assert "\n" not in str(error)
    else:
        # What was taken is of the key's type.
        types = {"bool": bool, "int": int, "float": float, "str": str, "path": str}
        if config[name] is not None and not KEYS[name].depth:
            assert type(config[name]) is types[KEYS[name].kind]


@settings(max_examples=40)
@given(st.floats(0, 1e300), st.integers(0, 2**63 - 1))
def test_numbers_survive_the_command_line(number, seed):
    config = load(f"matrix_lr={number!r}", f"seed={seed}")
    assert (config.matrix_lr, config.seed) == (number, seed)


# ---- Saving and help ----------------------------------------------------------------------------


def values(config):
    return {key: config[key] for key in pyconfig.keys_of(config)}


@pytest.mark.parametrize("model", ["d4", "d24_run4"])
def test_a_saved_config_is_a_first_argument(tmp_path, model):
    config = load(f"model={model}", "matrix_lr=1e-4", "trackers=[wandb, trackio]", "jax_cache_dir=")
    pyconfig.save(config, tmp_path / "run.yml")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yml"]
    again = pyconfig.initialize([str(tmp_path / "run.yml")])
    assert values(again) == values(config)
    assert set(again.origin.values()) == {"run.yml"}
    # Another reader of YAML finds the same values.
    plain = yaml.safe_load((tmp_path / "run.yml").read_text())
    assert plain["matrix_lr"] == 1e-4 and plain["trackers"] == ["wandb", "trackio"]
    assert plain["jax_cache_dir"] == "" and plain["stage"] is None

    changed = pyconfig.initialize([str(tmp_path / "run.yml"), "steps=7"])
    assert (changed.steps, changed.origin["steps"]) == (7, "command line")
    assert values(changed) == {**values(config), "steps": 7}
    assert "steps: 7  # command line" in pyconfig.to_yaml(changed)
    assert "start from configs/base.yml" in refusal("model=d6", first=str(tmp_path / "run.yml"))


def test_a_file_of_a_few_values_lies_above_its_model(tmp_path):
    (tmp_path / "mine.yml").write_text("model: d24\nsteps: 5\n")
    config = pyconfig.initialize([str(tmp_path / "mine.yml"), "seed=1"])
    assert (config.global_batch_tokens, config.steps, config.seed) == (524288, 5, 1)
    assert config.origin["global_batch_tokens"] == "d24.yml"


@settings(max_examples=40)
@given(st.text(max_size=40))
def test_any_text_survives_saving(tmp_path_factory, text):
    config = pyconfig.replace(load(), "test", text_column=text, trackers=(text, "b"))
    path = tmp_path_factory.mktemp("saved") / "run.yml"
    saved = pyconfig.to_yaml(config)
    keys = {**KEYS, "trackers": KEYS["trackers"]._replace(choices=())}
    path.write_text(saved, encoding="utf-8")
    read = config_schema.read_values(path, keys)
    assert (read["text_column"], read["trackers"]) == (text, (text, "b"))


def test_all_help_lists_every_key_with_type_range_default_and_text():
    text = config_schema.help_text()
    assert all(f"  {key}=" in text for key in KEYS)
    assert "  remat_policy=none  (str? one of none minimal full names)" in text
    assert "  num_decoder_layers=null  (int? 1..256)" in text
    assert "  rope_theta=100000.0  (float > 1)" in text
    assert text.index("The run") < text.index("run_name=") < text.index("Model size")
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("program", config_schema.PROGRAMS)
def test_help_fits_a_screen_and_is_the_programs(program):
    common = config_schema.help_text(program, show_all=False)
    shown = [key for key in KEYS if f"  {key}=" in common]
    assert 0 < len(shown) <= 30
    every = config_schema.help_text(program)
    read = [key for key in KEYS if f"  {key}=" in every]
    assert set(shown) <= set(read)
    assert f"These are {len(shown)} of {len(read)} keys; --help=all" in common
    assert ("splash_short_window" in read) == (
        program in "train evaluate chat serve train_compile".split()
    )
    assert "splash_short_window" not in shown


def test_a_config_that_an_earlier_version_saved_is_a_first_argument(tmp_path, monkeypatch):
    """Keys that are gone are ignored; a newer architecture key has the value its checkpoints imply."""
    path = tmp_path / "config.yml"
    pyconfig.save(load("model=d6", "steps=3", "qk_norm_scale=2", "use_backout=false"), path)
    kept = [line for line in path.read_text().splitlines() if not line.startswith("use_backout")]
    rules = (
        "logical_axis_rules: [[mlp, tensor], [activation_mlp, tensor], [activation_vocab, tensor]]"
    )
    kept = [rules if line.startswith("logical_axis_rules") else line for line in kept]
    path.write_text("\n".join([*kept, "download_attempts: 8  # base", ""]))
    keys = {**scaling.ARCHITECTURE_KEYS, "use_backout": False}
    monkeypatch.setattr(scaling, "ARCHITECTURE_KEYS", keys)
    config = pyconfig.initialize([str(path)])
    assert (config.steps, config.qk_norm_scale, config.use_backout) == (3, 2, False)
    assert "download_attempts" not in config and len(config.logical_axis_rules) == 3


# ---- Stages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "rl"])
@pytest.mark.parametrize("model", ["d2", "d24"])
def test_a_stage_has_a_folder_and_a_horizon_of_its_own(tmp_path, model, stage):
    """Whatever the model's file says, or the saved config of the stage before."""
    path = tmp_path / "run.yml"
    pyconfig.save(load(f"model={model}", "run_name=mine", "steps=99", "qk_norm_scale=2"), path)
    for first, *words in ((BASE, f"model={model}", "qk_norm_scale=2"), (str(path),)):
        config = pyconfig.initialize([first, *words, f"stage={stage}"])
        assert (config.run_name, config.origin["steps"]) == (f"{model}_{stage}", pyconfig.DERIVED)
        assert config.qk_norm_scale == 2
    # Once it is the config of that stage, it stays as it is.
    pyconfig.save(
        pyconfig.initialize([str(path), f"stage={stage}", "steps=5", "matrix_lr=1"]), path
    )
    again = pyconfig.initialize([str(path), f"stage={stage}"])
    assert (again.steps, again.matrix_lr) == (5, 1)


def test_a_batch_of_rollouts_is_all_answers_of_a_step():
    config = load("model=d2", "stage=rl", "rl_problems=3", "rl_samples=5", "rl_row_tokens=100")
    assert (config.global_batch_tokens, pyconfig.row_length(config)) == (1500, 100)
    assert (
        load(
            "model=d2", "stage=rl", "rl_row_tokens=null", "max_target_length=64"
        ).global_batch_tokens
        == 2**14
    )
    assert pyconfig.row_length(load("rl_row_tokens=100")) == 2048
    assert "global_batch_tokens=2048 is not rl_problems x" in refusal(
        "stage=rl", "global_batch_tokens=2048"
    )
    assert "rl_row_tokens=512 is larger than max_target_length=64" in refusal(
        "stage=rl", "max_target_length=64"
    )


# ---- The grammar of base.yml --------------------------------------------------------------------


def keys_of_text(tmp_path, text):
    (tmp_path / "grammar.yml").write_text(text)
    return config_schema.read_keys(tmp_path / "grammar.yml")


def test_brackets_and_stars_name_programs(tmp_path):
    keys = keys_of_text(
        tmp_path,
        "# ---- First [train chat] ---\n"
        "a: 1  # * int | help\n"
        "b: 1  # [serve] int | help\n"
        "c: 1  # [+serve*] int | help\n"
        "d: 1  # * [+serve] int | help\n"
        "# ---- Second ---\n"
        "e: 1  # int | help\n",
    )
    assert keys["a"].section == "First"
    assert (keys["a"].programs, keys["a"].common_in) == (("train", "chat"), ("train", "chat"))
    assert (keys["b"].programs, keys["b"].common_in) == (("serve",), ())
    assert (keys["c"].programs, keys["c"].common_in) == (("train", "chat", "serve"), ("serve",))
    assert keys["d"].common_in == ("train", "chat", "serve")
    assert keys["e"].programs == tuple(config_schema.PROGRAMS)


def test_comments_continue_and_banners_make_sections(tmp_path):
    keys = keys_of_text(
        tmp_path,
        "# ---- First -----\n"
        "a: 1  # int >= 0 | help of a\n"
        "       # that goes on\n"
        "# ---- Second: with words ---\n"
        "b:  # list of list of str | help | with a bar\n"
        "  - [x, y]\n"
        'c: "a # b"  # str? | quoted\n',
    )
    assert (keys["a"].section, keys["a"].help) == ("First", "help of a that goes on")
    assert (keys["b"].section, keys["b"].help) == ("Second: with words", "help | with a bar")
    assert keys["b"].depth == 2 and keys["c"].nullable
    assert config_schema.default_values(keys, "base.yml")["c"] == "a # b"


@pytest.mark.parametrize(
    "comment",
    [
        "",
        "# help without a type",
        "# int",
        "# integer | help",
        "# int > x | help",
        "# int 1.. | help",
        "# str >= 1 | help",
        "# int one of 1 2 | help",
        "# int? >= 0 and more | help",
        "# [trian] int | help",
        "# *int | help",
        "# list float | help",
        "# int >=0 | help",
    ],
)
def test_a_comment_that_does_not_parse_names_its_line(tmp_path, comment):
    with pytest.raises(pyconfig.ConfigError, match=r"line 2: the comment of b"):
        keys_of_text(tmp_path, f"a: 1  # int | help\nb: 1  {comment}\n")


def test_a_base_file_that_lacks_a_key_is_refused(tmp_path):
    (tmp_path / "base.yml").write_text("seed: 1  # int | help\n")
    assert "does not have the key adam_epsilon" in refusal(first=str(tmp_path / "base.yml"))


# ---- Entry points -------------------------------------------------------------------------------


def test_launch_tells_user_errors_from_faults(capsys):
    assert pyconfig.launch(lambda config: None, [BASE]) == 0
    assert pyconfig.launch(lambda config: 75, [BASE]) == 75
    # Raised in this package: the user's. Raised elsewhere: a traceback.
    assert pyconfig.launch(lambda config: load("steps=x"), [BASE]) == 2
    assert capsys.readouterr().err == "error: command line: steps=x is not an int\n"
    with pytest.raises(ValueError, match="could not convert"):
        pyconfig.launch(lambda config: float("x"), [BASE])


def test_help_is_printed_without_a_run(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["MaxNano/chat.py"])
    assert pyconfig.launch(lambda config: 1, ["--help"]) == 0
    common = capsys.readouterr().out
    assert common.startswith("usage: python MaxNano/chat.py ") and "temperature=0.6" in common
    assert "matrix_lr" not in common and "stream_interval" not in common
    assert pyconfig.launch(lambda config: 1, ["--help=all"]) == 0
    assert "stream_interval=128" in capsys.readouterr().out
    # A key that only train.py reads is accepted.
    assert pyconfig.launch(lambda config: 0, [BASE, "matrix_lr=0.1"]) == 0


SCRIPT = """
import sys
from MaxNano import pyconfig
status = pyconfig.launch(lambda config: 0)
assert "jax" not in sys.modules and "numpy" not in sys.modules
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        (["steps=1"], 0, ""),
        (["stepss=1"], 2, "error: command line: unknown key stepss; did you mean steps"),
    ],
)
def test_a_process_ends_without_jax_and_without_a_traceback(words, status, error):
    command = [sys.executable, "-c", SCRIPT, BASE, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert done.stderr.startswith(error) and done.stderr.count("\n") == (1 if error else 0)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("accel0", True),
        ("vfio/0", True),
        ("nvidia0", True),
        ("kfd", True),
        ("dxg", True),
        ("nvidiactl", False),
        ("vfio/vfio", False),
        ("null", False),
    ],
)
def test_accelerators_are_seen_by_their_device_files(tmp_path, name, expected):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert pyconfig.has_accelerator(tmp_path) is expected
