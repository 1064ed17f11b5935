"""A run goes out to `transformers` and comes back bit for bit; there it has the same ids, logits
and greedy text.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_convert import assert_same, logits_of, random_params

from MaxNano import convert, pyconfig, scaling
from MaxNano.interop import huggingface, parameters, tensor_files
from MaxNano.tokenization.bpe import NANOCHAT_PATTERN, BpeTokenizer, train_bpe
from MaxNano.tokenization.tokenizer import (
    SPECIAL_TOKENS,
    SpecialIds,
    load_tokenizer,
    load_tokenizer_from,
)
from MaxNano.training.checkpointing import Checkpointer

tokenizers = pytest.importorskip("tokenizers", reason="of the extra `export`")
pytest.importorskip("safetensors", reason="of the extra `export`")

ROOT = Path(__file__).resolve().parents[1]
BASE = str(pyconfig.BASE)
SIZES = [
    "model=d4",
    "emb_dim=64",
    "head_dim=16",
    "mlp_dim=96",
    "max_target_length=64",
    "short_window_multiple=4",
]
MODELS = {
    "windows": ["short_window_fraction=0.1"],
    "groups": [
        "num_kv_heads=2",
        "model=d3",
        "window_pattern=SL",
        "temperature=0",
        "chat_turns=true",
    ],
    "plain": [
        "value_embed_gate_channels=0",
        "smear_gate_channels=0",
        "use_backout=false",
        "logits_soft_cap=0",
        "window_pattern=L",
        "rope_theta=10000",
        "qk_norm_scale=1",
        "vocab_multiple=1",
    ],
    "other": [
        "value_embed_gate_channels=5",
        "value_embed_gate_range=2",
        "smear_gate_channels=7",
        "norm_epsilon=1e-3",
        "logits_soft_cap=4",
        "num_kv_heads=1",
        "vocab_multiple=128",
        "model=d5",
    ],
}
CONVERSATION = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 12 x 3?"},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "It is "},
            {"type": "python", "text": "12*3"},
            {"type": "python_output", "text": "36"},
            {"type": "text", "text": "36."},
        ],
    },
    {"role": "user", "content": " And twice that?\n"},
    {"role": "assistant", "content": "72"},
]


def words_of_text() -> str:
    return (ROOT / "README.md").read_text() + (ROOT / "MaxNano/tasks/words.txt").read_text()[
        :50_000
    ]


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    return train_bpe([words_of_text()], 600)


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    """name -> (config, parameters, exported folder), each a run of its own that has gone out."""
    place = tmp_path_factory.mktemp("models")
    tokenizer.save(place / "tokenizer")
    made = {}
    for name, words in MODELS.items():
        config = pyconfig.initialize(
            [
                BASE,
                *SIZES,
                f"run_name={name}",
                f"base_output_directory={place / 'runs'}",
                "vocab_size=600",
                f"tokenizer_path={place / 'tokenizer'}",
                *words,
            ]
        )
        params = jax.tree.map(
            lambda leaf: (0.15 * leaf.astype(np.float32)).astype(leaf.dtype), random_params(config)
        )
        params["resid_lambdas"] += 1
        folder = place / name
        tensors = parameters.from_params(params, config, huggingface.NAMES)
        huggingface.write_folder(folder, config, 12, tensors, tokenizer)
        made[name] = config, params, folder
    return made


def run_command(*words) -> pyconfig.FrozenConfigDict:
    argv = [BASE, *map(str, words)]
    config = pyconfig.initialize(argv)
    convert.main(config, argv)
    return config


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- Out and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_parameters_come_back_bit_for_bit(models, name):
    config, params, folder = models[name]
    found = tensor_files.read_tensors(folder / "model.safetensors")
    assert_same(parameters.to_params(found, config, huggingface.NAMES), params)


@pytest.mark.parametrize("name", ["windows", "groups"])
def test_a_run_goes_out_and_comes_back_bit_for_bit(models, tokenizer, tmp_path, name):
    config, params, folder = models[name]
    runs = f"base_output_directory={tmp_path / 'runs'}"
    run_command(f"from_huggingface={folder}", runs, "run_name=back")
    back = pyconfig.initialize([str(tmp_path / "runs/back/config.yml")])
    for key in huggingface.fields().values():
        assert back[key] == config[key] and type(back[key]) is type(config[key])
    assert back.chat_turns is bool(config.chat_turns) and back.embedding_dtype == "bfloat16"
    with Checkpointer(back, tmp_path / "runs/back", writer=False) as checkpointer:
        found, extra = checkpointer.restore_params_only()
    assert_same(found, params)
    assert extra["run"]["step"] == 12
    assert (
        load_tokenizer(back).fingerprint() == tokenizer.fingerprint() == extra["run"]["tokenizer"]
    )

    words = [f"temperature={config.temperature}", "run_name=back", runs]
    run_command(f"to_huggingface={tmp_path / 'out'}", *words)
    again = contents(tmp_path / "out")
    for file, content in contents(folder).items():
        if file != "generation_config.json":  # how to draw is the run's, not the model's
            assert again[file] == content, file
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_names_shapes_and_files(models):
    config, _, folder = models["groups"]
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    layer = {
        "self_attn.q_proj.weight": (64, 64),
        "self_attn.k_proj.weight": (32, 64),
        "self_attn.v_proj.weight": (32, 64),
        "self_attn.o_proj.weight": (64, 64),
        "mlp.up_proj.weight": (96, 64),
        "mlp.down_proj.weight": (64, 96),
    }
    valued = {"self_attn.value_embed.weight": (640, 32), "self_attn.value_gate.weight": (2, 12)}
    expected = {
        f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in layer.items()
    }
    expected |= {
        f"model.layers.{i}.{name}": shape for i in (0, 2) for name, shape in valued.items()
    }
    expected |= {
        "model.embed_tokens.weight": (640, 64),
        "lm_head.weight": (640, 64),
        "model.resid_lambdas": (3,),
        "model.x0_lambdas": (3,),
        "model.smear_gate.weight": (1, 24),
        "model.smear_lambda": (1,),
        "model.backout_lambda": (1,),
    }
    assert shapes == expected
    content = json.loads((folder / "config.json").read_text())
    assert (
        content["hidden_size"] == 64
        and content["vocab_size"] == 600
        and content["num_key_value_heads"] == 2
    )
    assert content["chat_turns"] is True and content["step"] == 12
    for target in content["auto_map"].values():
        module, name = target.split(".")
        assert f"class {name}(" in (folder / f"{module}.py").read_text()
    generation = json.loads((folder / "generation_config.json").read_text())
    special = SpecialIds(*range(591, 600))
    assert (
        generation["eos_token_id"] == [special.assistant_end, special.bos]
        and generation["do_sample"] is False
    )
    assert sorted(contents(folder)) == [
        "README.md",
        "config.json",
        "configuration_maxnano.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_maxnano.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_every_switch_of_the_model_is_in_the_code_that_travels(models):
    """The code reads each field of config.json, and declares each with a default."""
    declared = (huggingface.TEMPLATES / "configuration_maxnano.py").read_text()
    used = declared + (huggingface.TEMPLATES / "modeling_maxnano.py").read_text()
    for field in huggingface.fields():
        assert f"self.{field} = {field}" in declared
        assert used.count(f"config.{field}") + used.count(f"self.{field}") > 1, field


def test_large_models_are_cut_into_files(models, tokenizer, tmp_path, monkeypatch):
    config, params, folder = models["other"]
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 100_000)
    tensors = parameters.from_params(params, config, huggingface.NAMES)
    huggingface.write_folder(tmp_path / "cut", config, 12, tensors, tokenizer)
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert set(index["weight_map"].values()) == set(files) and len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    found = {}
    for file in huggingface.read_folder(tmp_path / "cut").weights:
        arrays = tensor_files.read_tensors(file)
        assert sum(a.nbytes for a in arrays.values()) <= 100_000 or len(arrays) == 1
        assert all(index["weight_map"][name] == file.name for name in arrays)
        found |= arrays
    assert_same(found, tensors)


# ---- Tokenizer ----------------------------------------------------------------------------------

TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cn"])
    | st.sampled_from("  \n\r\t'aeinorst0129.,_-é")
)


@pytest.fixture(scope="module")
def as_file(models):
    return tokenizers.Tokenizer.from_file(str(models["windows"][2] / "tokenizer.json"))


@settings(max_examples=200)
@given(text=TEXT)
def test_ids_are_the_same(as_file, tokenizer, text):
    ids = tokenizer.encode(text)
    assert as_file.encode(text, add_special_tokens=False).ids == ids
    assert as_file.encode(text).ids == [tokenizer.bos_id, *ids]
    assert as_file.decode(ids) == tokenizer.decode(ids)


def test_ids_are_the_same_on_long_text_and_special_tokens_are_tokens(as_file, tokenizer):
    text = words_of_text()
    assert as_file.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    for name, i in zip(SPECIAL_TOKENS, tokenizer.special, strict=True):
        assert as_file.encode(name, add_special_tokens=False).ids == [i]
    assert as_file.get_vocab_size() == tokenizer.vocab_size


@settings(max_examples=40)
@given(
    joins=st.lists(st.tuples(st.integers(0, 33), st.integers(0, 33)), max_size=30),
    texts=st.lists(st.text("ab c", max_size=30), max_size=8),
)
def test_ids_of_any_vocabulary_are_the_same(joins, texts):
    """Tokens that are joined of any two before them, in any order, are more ambiguous than learned
    ones.
    """
    pieces = [bytes([letter]) for letter in b"ab c"]
    for left, right in joins:
        joined = pieces[left % len(pieces)] + pieces[right % len(pieces)]
        if joined not in pieces:
            pieces.append(joined)
    rest = [bytes([byte]) for byte in range(256) if byte not in b"ab c"]
    ranks = {piece: i for i, piece in enumerate(pieces + rest)}
    made = BpeTokenizer(r" ?\S+|\s+", ranks)
    model = tokenizers.Tokenizer.from_str(json.dumps(huggingface.bpe_json(made)))
    for text in texts:
        assert model.encode(text).ids == made.encode(text)


def test_ids_that_are_left_out_keep_their_places(tmp_path):
    """As in published rank files: one id in the middle is a special's, another one nobody's."""
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 257, b"abc": 258}
    made = BpeTokenizer(NANOCHAT_PATTERN, ranks, {"<|bos|>": 256, "<|user_start|>": 260})
    content = huggingface.bpe_json(made)
    model = tokenizers.Tokenizer.from_str(json.dumps(content))
    assert model.encode("abc<|bos|>ab<|user_start|>").ids == [258, 256, 257, 260]
    assert [model.token_to_id(name) for name in SPECIAL_TOKENS] == list(made.special)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert huggingface.read_tokenizer(tmp_path).fingerprint() == made.fingerprint()


def test_a_foreign_tokenizer_goes_out_and_comes_back(models, tmp_path):
    """Its own <|bos|> keeps its name; the special tokens that it lacks come behind."""
    content = huggingface.bpe_json(BpeTokenizer(r"\S+|\s+", {bytes([i]): i for i in range(256)}))
    begin = {**content["added_tokens"][0], "content": "<|endoftext|>"}
    path = tmp_path / "foreign.json"
    path.write_text(json.dumps(content | {"added_tokens": [begin]}))
    foreign = load_tokenizer_from("huggingface", path)
    assert (foreign.bos_id, foreign.vocab_size) == (256, 265)
    config = pyconfig.initialize(
        [
            BASE,
            *SIZES,
            "vocab_size=265",
            "tokenizer_type=huggingface",
            f"tokenizer_path={path}",
        ]
    )
    tensors = parameters.from_params(random_params(config), config, huggingface.NAMES)
    huggingface.write_folder(tmp_path / "out", config, 0, tensors, foreign)
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert model.encode("a").ids == [256, 97]
    assert [model.token_to_id(name) for name in SPECIAL_TOKENS[1:]] == list(range(257, 265))
    assert (
        json.loads((tmp_path / "out/tokenizer_config.json").read_text())["bos_token"]
        == "<|endoftext|>"
    )
    run_command(
        f"from_huggingface={tmp_path / 'out'}", f"base_output_directory={tmp_path}", "run_name=back"
    )
    back = pyconfig.initialize([str(tmp_path / "back/config.yml")])
    found = load_tokenizer(back)
    assert back.tokenizer_type == "huggingface" and found.special == foreign.special
    assert found.encode("ab\n") == foreign.encode("ab\n")


def test_a_folder_older_than_an_architecture_key_has_the_keys_implied_value(models, monkeypatch):
    config, _, folder = models["plain"]
    keys = {**scaling.ARCHITECTURE_KEYS, "mlp_activation": "relu2"}
    monkeypatch.setattr(scaling, "ARCHITECTURE_KEYS", keys)
    assert huggingface.read_folder(folder).values["mlp_activation"] == "relu2"
    monkeypatch.setattr(huggingface, "UNSUPPORTED", frozenset({"mlp_activation"}))
    newer = pyconfig.FrozenConfigDict({**config.to_dict(), "mlp_activation": "swiglu"})
    with pytest.raises(ValueError, match="cannot export mlp_activation=swiglu"):
        huggingface.check_exportable(newer)


# ---- What is refused ----------------------------------------------------------------------------


def test_a_folder_is_only_replaced_when_told_and_only_its_own_kind(models, tokenizer, tmp_path):
    config, params, folder = models["plain"]
    target = tmp_path / "target"
    shutil.copytree(folder, target)
    tensors = parameters.from_params(params, config, huggingface.NAMES)
    with pytest.raises(ValueError, match="already has a model; .*convert_overwrite=true"):
        huggingface.write_folder(target, config, 13, tensors, tokenizer)
    assert contents(target) == contents(folder)
    with (
        pytest.raises(OSError),
        pytest.MonkeyPatch.context() as patch,
    ):  # what fails half-way leaves all as it was
        patch.setattr(
            huggingface, "_write_tensors", lambda *_: (_ for _ in ()).throw(OSError("no space"))
        )
        huggingface.write_folder(target, config, 13, tensors, tokenizer, replace=True)
    assert contents(target) == contents(folder) and [path.name for path in tmp_path.iterdir()] == [
        "target"
    ]
    huggingface.write_folder(target, config, 13, tensors, tokenizer, replace=True)
    assert json.loads((target / "config.json").read_text())["step"] == 13
    assert [path.name for path in tmp_path.iterdir()] == ["target"]

    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("all of it")
    for other in (tmp_path / "precious", tmp_path / "precious/thesis.txt"):
        with pytest.raises(ValueError, match="exists and is not a MaxNano model"):
            huggingface.write_folder(other, config, 13, tensors, tokenizer, replace=True)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda f: (f / "config.json").unlink(), "there is no .*config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot read .*config.json"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
            "model_type 'llama', not 'maxnano'",
        ),
        (lambda f: edit(f, hidden_size=None), "does not have 'hidden_size'"),
        (lambda f: edit(f, window_pattern="X"), "window_pattern"),
        (lambda f: edit(f, step=-1), "step -1"),
        (lambda f: edit(f, num_hidden_layers=5), "does not have 'model.layers.4"),
        (lambda f: edit(f, use_backout=False), "has 'model.backout_lambda'"),
        (lambda f: edit(f, vocab_size=590), "tokenizer of .* has 600 tokens but the model has 590"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"x" * 100),
            "cannot read .*model.safetensors",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "there is no file .*model.safetensors"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../b"}}'
            ),
            "does not name files",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is not a Hugging Face"),
    ],
)
def test_broken_folders_are_one_line(models, tmp_path, change, message):
    shutil.copytree(models["windows"][2], tmp_path / "broken")
    change(tmp_path / "broken")
    with pytest.raises(ValueError, match=message) as caught:
        run_command(
            f"from_huggingface={tmp_path / 'broken'}",
            f"base_output_directory={tmp_path}",
            "run_name=a",
        )
    assert "\n" not in str(caught.value) and not (tmp_path / "a").exists()


def edit(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_a_sentencepiece_model_does_has_no_equal(models):
    class Foreign:
        special = SpecialIds(*range(9))

    config = pyconfig.replace(models["plain"][0], "test", tokenizer_type="sentencepiece")
    with pytest.raises(ValueError, match="tokenizer_type=sentencepiece has no tokenizer.json"):
        huggingface.tokenizer_json(config, Foreign())


def test_the_command_line_says_so_in_one_line(models, tmp_path):
    def error_of(*words):
        done = programs.run("MaxNano/convert.py", "configs/base.yml", *words)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
        return done.stderr

    folder = models["plain"][2]
    assert "already has a model" in error_of(f"to_huggingface={folder}", "run_name=nothing")


# ---- In transformers ----------------------------------------------------------------------------


def pythons() -> list[str]:
    """Those that TRANSFORMERS_PYTHON names, or this one if it has torch and transformers."""
    if named := os.environ.get("TRANSFORMERS_PYTHON"):
        return named.split(os.pathsep)
    return [sys.executable] if find_spec("torch") and find_spec("transformers") else []


def environment(python: str) -> str:
    """Its folder's name, for a test's id: run_transformers.sh names it after the version."""
    return Path(python).parts[-3] if python else "none"


@pytest.fixture(scope="module", params=pythons() or [""], ids=environment)
def python_with_transformers(request) -> str:
    """A Python with torch and transformers."""
    if not request.param:
        pytest.skip("needs torch and transformers: bash tests/run_transformers.sh installs them")
    return request.param


@pytest.fixture(scope="module")
def answers(models, python_with_transformers, tmp_path_factory):
    """What transformers answers about each model: arrays and JSON; one process for all."""
    texts = [
        "",
        "Hello world",
        "  two  spaces\n\n",
        "It's 12345 o'clock, naïve café — ☃",
        words_of_text()[:3000],
    ]
    rng = np.random.default_rng(0)
    for config, _, folder in models.values():
        ids = rng.integers(0, config.vocab_size, size=(2, config.max_target_length)).tolist()
        asked = {"texts": texts, "conversation": CONVERSATION, "ids": ids, "new_tokens": 40}
        Path(f"{folder}.json").write_text(json.dumps(asked))
        shutil.rmtree(f"{folder}.again", ignore_errors=True)
    folders = [folder for _, _, folder in models.values()]
    command = [python_with_transformers, ROOT / "tests/with_transformers.py", *folders]
    home = tmp_path_factory.mktemp("home")  # where transformers copies the code that travels
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    def of(folder):
        with np.load(f"{folder}.npz") as file:
            arrays = {name: file[name] for name in file.files}
        asked, found = (
            json.loads(Path(f"{folder}{end}").read_text()) for end in (".json", ".answers.json")
        )
        return asked, found, arrays

    return {name: of(folder) for name, (_, _, folder) in models.items()}


@pytest.fixture(scope="module")
def logits(models):
    """(name of a model, token ids) -> our logits, computed once for all versions."""
    computed = {}

    def compute(name, rows):
        key = name, np.asarray(rows).tobytes()
        if key not in computed:
            computed[key] = logits_of(*models[name][:2], rows)
        return computed[key]

    return compute


@pytest.mark.parametrize("name", MODELS)
def test_transformers_has_our_logits(models, answers, logits, name):
    config = models[name][0]
    asked, found, arrays = answers[name]
    rows = np.asarray(asked["ids"])
    expected = logits(name, rows)
    assert arrays["logits"].shape == expected.shape and np.ptp(expected) > 2
    np.testing.assert_allclose(arrays["logits"], expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(arrays["cached"], expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(arrays["padded"][0, 5:], expected[0, :-5], atol=1e-4, rtol=0)
    np.testing.assert_allclose(arrays["padded"][1], expected[1], atol=1e-4, rtol=0)
    log_probs = np.asarray(jax.nn.log_softmax(expected))
    loss = -np.take_along_axis(log_probs[:, :-1], rows[:, 1:, None], axis=-1).mean()
    assert arrays["loss"] == pytest.approx(loss, abs=1e-4)
    assert found["half_loss"] == pytest.approx(loss, rel=0.05)
    assert {"model.resid_lambdas", "model.x0_lambdas"} <= set(found["half"])
    assert set(found["half"].values()) == {"torch.float32"}
    assert found["windows"] == list(pyconfig.windows_of(config))


@pytest.mark.parametrize("name", MODELS)
def test_transformers_generates_what_we_do(answers, logits, name):
    """Greedily, over its cache and without, padded or not: our logits' best token, and the
    engine's.
    """
    asked, _, arrays = answers[name]
    rows = np.asarray(asked["ids"])[:, :8]
    np.testing.assert_array_equal(arrays["greedy"], arrays["uncached"])
    np.testing.assert_array_equal(arrays["beams"], arrays["uncached_beams"])
    np.testing.assert_array_equal(arrays["padded_greedy"][0, 5 : 5 + 48], arrays["greedy"][0])
    best = logits(name, arrays["greedy"]).argmax(axis=-1)
    np.testing.assert_array_equal(arrays["greedy"][:, 8:], best[:, 7:-1])
    assert arrays["greedy"].shape == (2, 48) and len(np.unique(arrays["greedy"][:, 8:])) > 3
    np.testing.assert_array_equal(arrays["greedy"][:, :8], rows)


@pytest.fixture(scope="module")
def engine(models, tmp_path_factory):
    """The engine of the model `groups`, imported from its folder."""
    from MaxNano.training.loading import load_engine

    place = tmp_path_factory.mktemp("engine")
    base = f"base_output_directory={place}"
    run_command(f"from_huggingface={models['groups'][2]}", base, "run_name=a", "num_cpu_devices=1")
    config = pyconfig.initialize([str(place / "a/config.yml"), "decode_slots=2"])
    return load_engine(config, slots=2, max_length=64)


def test_the_engine_says_the_same(answers, engine):
    from MaxNano.inference.requests import Request

    asked, _, arrays = answers["groups"]
    prompts = [Request(prompt=tuple(row[:8]), max_tokens=40, temperature=0) for row in asked["ids"]]
    said = [list(completions[0].tokens) for completions in engine.generate(prompts)]
    np.testing.assert_array_equal(said, arrays["greedy"][:, 8:])


@pytest.mark.parametrize("name", MODELS)
def test_transformers_refuses_what_would_be_other_text(answers, name):
    """A cache by an unknown name or of an unknown kind, and one that did not arrive."""
    unknown, static, also_static, lost = answers[name][1]["refusals"]
    assert "one cache, as cache or past_key_values, not ['memory']" in unknown
    assert "takes a DynamicCache, not a StaticCache" in static and static == also_static
    assert "attention_mask has 64 positions, cache and input_ids 1" in lost


@pytest.mark.parametrize("name", MODELS)
def test_transformers_has_our_ids_and_turns(models, answers, tokenizer, name):
    asked, found, _ = answers[name]
    assert found["ids"] == [tokenizer.encode(text) for text in asked["texts"]]
    assert found["decoded"] == asked["texts"] and found["first"] == tokenizer.bos_id
    assert found["rendered"] == tokenizer.render_conversation({"messages": CONVERSATION})[0]
    assert found["prompt"] == tokenizer.render_for_completion({"messages": CONVERSATION})
    assert found["eos"] == ("<|assistant_end|>" if name == "groups" else "<|bos|>")


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_comes_back(models, answers, tokenizer, tmp_path, name):
    _, params, folder = models[name]
    again = Path(f"{folder}.again")
    assert (again / "model.safetensors.index.json").exists()
    run_command(f"from_huggingface={again}", f"base_output_directory={tmp_path}", "run_name=a")
    config = pyconfig.initialize([str(tmp_path / "a/config.yml")])
    with Checkpointer(config, tmp_path / "a", writer=False) as checkpointer:
        found, _ = checkpointer.restore_params_only()
    assert_same(
        found, jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    )  # it knows one dtype a model
    assert load_tokenizer(config).fingerprint() == tokenizer.fingerprint()
