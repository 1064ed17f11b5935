"""nanochat checkpoints travel both ways bit for bit; hostile and broken ones are refused."""

import json
import os
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import programs
import pytest
import tiktoken

from MaxNano import convert, pyconfig, scaling
from MaxNano.distributed.mesh import make_mesh
from MaxNano.interop import nanochat, tensor_files
from MaxNano.models.setup import architecture
from MaxNano.models.transformer import Numerics
from MaxNano.optimizers import groups
from MaxNano.tokenization.bpe import NANOCHAT_PATTERN
from MaxNano.tokenization.tokenizer import SPECIAL_TOKENS, load_tokenizer
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.state import abstract_state

ROOT = Path(__file__).resolve().parents[1]
BASE = str(pyconfig.BASE)


def golden() -> tuple[dict[str, np.ndarray], dict]:
    with np.load(ROOT / "tests/golden/nanochat_small.npz") as file:
        arrays = {k.removeprefix("init/"): file[k] for k in file.files if k.startswith("init/")}
        return arrays, json.loads(str(file["config"]))


def golden_config(*words: str):
    sizes = ["model=d4", "emb_dim=64", "head_dim=32", "vocab_size=250", "max_target_length=256"]
    return pyconfig.initialize([BASE, *sizes, *words])


def random_params(config, seed=0) -> dict:
    """Random values in the shapes and dtypes that the model itself declares."""
    shapes = architecture(
        config, Numerics("float32", "bfloat16", "reference", "scatter", "cpu")
    ).shapes
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)


def logits_of(config, params, rows) -> np.ndarray:
    """The model's float32 logits (B, L, V) of token ids (B, L)."""
    model = architecture(config, Numerics("float32", "float32", "reference", "scatter", "cpu"))
    bound = model.bind(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params))
    return np.asarray(bound.logits(bound(jnp.asarray(rows))))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---- Parameters ---------------------------------------------------------------------------------


def test_golden_checkpoint_goes_round():
    arrays, _ = golden()
    params = nanochat.to_params(arrays, golden_config())
    assert_same(nanochat.from_params(params, golden_config()), arrays)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["num_kv_heads=1"],
        ["model=d3", "vocab_size=64"],
        ["mlp_dim=96", "smear_gate_channels=0", "use_backout=false"],
        ["value_embed_gate_channels=0"],
    ],
)
def test_the_models_own_parameters_go_round(words):
    config = golden_config(*words)
    params = random_params(config)
    assert params["token_embed"].dtype == ml_dtypes.bfloat16
    arrays = nanochat.from_params(params, config)
    assert_same(nanochat.to_params(arrays, config), params)


def test_matrices_are_transposed_and_layers_stacked():
    arrays, _ = golden()
    params = nanochat.to_params(arrays, golden_config())
    np.testing.assert_array_equal(
        params["layers"]["mlp"]["wi"][2], arrays["transformer.h.2.mlp.c_fc.weight"].T
    )
    np.testing.assert_array_equal(params["value_embeds"][1], arrays["value_embeds.3.weight"])
    np.testing.assert_array_equal(
        params["value_gate"][0], arrays["transformer.h.1.attn.ve_gate.weight"].T
    )
    assert params["smear_lambda"].shape == () and params["smear_gate"].shape == (24,)


@pytest.mark.parametrize("multiple", [1, 50, 512])
def test_vocabulary_rows_survive_another_padding(multiple):
    arrays, _ = golden()
    config = golden_config(f"vocab_multiple={multiple}")
    params = nanochat.to_params(arrays, config)
    assert params["token_embed"].shape[0] == max(250, multiple)
    back = nanochat.from_params(params, config)
    for name, array in arrays.items():
        rows = 250 if array.shape[0] == 256 and "h." not in name else len(array)
        assert back[name].shape == array.shape
        np.testing.assert_array_equal(back[name][:rows], array[:rows])


def test_old_checkpoints_get_neutral_lambdas_and_lose_the_compile_prefix():
    arrays, _ = golden()
    del arrays["resid_lambdas"], arrays["x0_lambdas"]
    arrays = {f"_orig_mod.{name}": array for name, array in arrays.items()}
    params = nanochat.to_params(arrays, golden_config())
    np.testing.assert_array_equal(params["resid_lambdas"], np.ones(4, np.float32))
    np.testing.assert_array_equal(params["x0_lambdas"], np.zeros(4, np.float32))


def test_misfits_are_named():
    arrays, _ = golden()
    config = golden_config()
    params = nanochat.to_params(arrays, config)
    missing = {k: v for k, v in arrays.items() if k != "transformer.h.2.attn.c_k.weight"}
    with pytest.raises(ValueError, match=r"does not have 'transformer.h.2.attn.c_k.weight'"):
        nanochat.to_params(missing, config)
    with pytest.raises(ValueError, match=r"has 'transformer.h.4.thing'"):
        nanochat.to_params({**arrays, "transformer.h.4.thing": np.ones(1)}, config)
    with pytest.raises(ValueError, match=r"'lm_head.weight' has shape \(64, 256\) .* \(256, 64\)"):
        nanochat.to_params({**arrays, "lm_head.weight": arrays["lm_head.weight"].T}, config)
    with pytest.raises(ValueError, match="do not have 'lm_head'"):
        nanochat.from_params({k: v for k, v in params.items() if k != "lm_head"}, config)
    with pytest.raises(ValueError, match="no tensor for parameter 'layers/extra'"):
        layers = {**params["layers"], "extra": np.ones(1)}
        nanochat.from_params({**params, "layers": layers}, config)
    with pytest.raises(ValueError, match=r"'x0_lambdas' has shape \(3,\), expected \(4,\)"):
        nanochat.from_params({**params, "x0_lambdas": np.ones(3)}, config)


# ---- Files --------------------------------------------------------------------------------------


def torch_or_skip(suffix: str) -> None:
    if suffix == ".pt":
        pytest.importorskip("torch", reason="only .pt files need torch, which no extra installs")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_files_keep_every_bit(tmp_path, suffix):
    torch_or_skip(suffix)
    arrays = nanochat.from_params(random_params(golden_config()), golden_config())
    path = tmp_path / "new" / f"model_000012{suffix}"
    nanochat.write_checkpoint(path, arrays, {"step": 12})
    assert_same(tensor_files.read_tensors(path), arrays)
    assert sorted(p.name for p in path.parent.iterdir()) == ["meta_000012.json", path.name]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_cut_files_are_one_line(tmp_path, suffix, keep):
    torch_or_skip(suffix)
    path = tmp_path / f"model_000001{suffix}"
    nanochat.write_checkpoint(path, golden()[0], {})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match="cannot read .*model_000001") as caught:
        tensor_files.read_tensors(path)
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return os.system, ("touch $EVIL_FILE",)


@pytest.fixture
def evil_file(tmp_path, monkeypatch):
    path = tmp_path / "evil"
    monkeypatch.setenv("EVIL_FILE", str(path))
    yield path
    assert not path.exists()


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, evil_file, suffix):
    torch_or_skip(suffix)
    path = tmp_path / f"model_1{suffix}"
    if suffix == ".npz":
        np.savez(path, x=np.array(Evil(), dtype=object))
    else:
        import torch

        torch.save({"x": Evil()}, path)
    with pytest.raises(ValueError, match="cannot read"):
        tensor_files.read_tensors(path)


def encoding(**changes) -> tiktoken.Encoding:
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    special = {name: 258 + i for i, name in enumerate(SPECIAL_TOKENS)}
    parts = {
        "name": "rustbpe",
        "pat_str": NANOCHAT_PATTERN,
        "mergeable_ranks": ranks,
        "special_tokens": special,
    }
    return tiktoken.Encoding(**{**parts, **changes})


def test_tokenizer_pickle_is_read(tmp_path):
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(encoding()))
    found = nanochat.read_tokenizer(path)
    text = "the theory\n\n of 1234 things, <|bos|> é"
    assert found.encode(text) == encoding().encode_ordinary(text)
    assert found.vocab_size == 267 and found.bos_id == 258


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil()),
        pickle.dumps({"mergeable_ranks": {}, "x": Evil()}),
        pickle.dumps(tiktoken.get_encoding),
        b"cbuiltins\neval\n(S'open(\"/dev/null\")'\ntR.",
        b"ctiktoken.core\nEncoding.__init__\n.",
        b"ctiktoken.core\nEncoding\n(S'gpt2'\ntR.",
        b"\x80\x02ctiktoken.core\nEncoding\n)\x81X\x04\x00\x00\x00gpt2b.",
        b"ctiktoken.core\nEncoding\n.",
        b"Ppersistent\n.",
        pickle.dumps(encoding())[:-40],
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
    ],
)
def test_other_pickles_are_refused(tmp_path, evil_file, content):
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.pkl is not nanochat's tokenizer: .") as caught:
        nanochat.read_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_foreign_special_tokens_are_refused(tmp_path):
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(encoding(special_tokens={"<|endoftext|>": 258})))
    with pytest.raises(ValueError, match="special token '<|endoftext|>'"):
        nanochat.read_tokenizer(path)


# ---- The command --------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """nanochat's folders with the golden checkpoint, tables in bfloat16, at step 7."""
    arrays, model = golden()
    for name in arrays:
        if name == "transformer.wte.weight" or name.startswith("value_embeds"):
            arrays[name] = arrays[name].astype(ml_dtypes.bfloat16)
    path = tmp_path / "nanochat/base_checkpoints/d4/model_000007.safetensors"
    nanochat.write_checkpoint(path, arrays, {"step": 7, "model_config": model})
    return path, arrays


def run_command(tmp_path, *words: str) -> None:
    argv = [BASE, f"base_output_directory={tmp_path / 'runs'}", *words]
    convert.main(pyconfig.initialize(argv), argv)


def test_command_imports_and_exports(tmp_path, checkpoint):
    path, arrays = checkpoint
    run_command(tmp_path, f"from_nanochat={path}", "run_name=a", "steps=9")
    config = pyconfig.initialize([str(tmp_path / "runs/a/config.yml")])
    assert (config.num_decoder_layers, config.emb_dim, config.head_dim) == (4, 64, 32)
    assert (config.max_target_length, config.vocab_size, config.steps) == (256, 250, 9)
    assert config.embedding_dtype == "bfloat16" and config.run_name == "a"
    with Checkpointer(config, tmp_path / "runs/a", writer=False) as checkpointer:
        assert checkpointer.latest_step() == 7
        params, _ = checkpointer.restore_params_only()
        # Training can go on from it: the whole state has the form that train.py asks for.
        model = architecture(config, Numerics("float32", "bfloat16", "reference", "scatter", "cpu"))
        optimizer = groups.make_optimizer(config, dtype="float32")
        mesh = make_mesh(config, jax.devices()[:1])
        state, extra = checkpointer.restore(abstract_state(config, model, optimizer, mesh))
    assert_same(params, nanochat.to_params(arrays, config))
    assert_same(jax.tree.map(np.asarray, state.params), params)
    assert int(state.step) == 7 and extra["data"] is None

    target = tmp_path / "out/model_000007.npz"
    run_command(tmp_path, f"to_nanochat={target}", "run_name=a")
    assert_same(tensor_files.read_tensors(target), arrays)
    assert nanochat.read_meta(target)["model_config"] == golden()[1]
    with pytest.raises(ValueError, match="already has checkpoints"):
        run_command(tmp_path, f"from_nanochat={path}", "run_name=a")


@pytest.mark.parametrize(
    "fields,expected",
    [
        ({"total_batch_size": 131072, "user_config": {"total_batch_size": -1}}, 131072),
        ({"user_config": {"total_batch_size": 524288}}, 524288),  # of 2025
        ({"total_batch_size": 1000}, None),  # not whole rows
        ({"total_batch_size": "131072", "user_config": [1]}, None),
        ({}, None),
    ],
)
def test_command_takes_over_the_batch_size(tmp_path, checkpoint, capsys, fields, expected):
    """The fine-tuning of an imported model had the batch of the scaling law, not nanochat's."""
    path, arrays = checkpoint
    nanochat.write_checkpoint(path, arrays, {**nanochat.read_meta(path), **fields})
    law = golden_config().global_batch_tokens
    run_command(tmp_path, f"from_nanochat={path}", "run_name=a")
    saved = str(tmp_path / "runs/a/config.yml")
    assert pyconfig.initialize([saved]).global_batch_tokens == (expected or law) != 2048
    out = capsys.readouterr().out
    assert f"global_batch_tokens={expected or law} ({'nanochat' if expected else 'derived'})" in out
    later = pyconfig.initialize([saved, "stage=sft", "load_from=a", "run_name=a_sft"])
    assert later.global_batch_tokens == (expected or law)
    # The command line decides, and the export tells it.
    run_command(tmp_path, f"from_nanochat={path}", "run_name=b", "global_batch_tokens=2048")
    target = tmp_path / "out/model_000007.npz"
    run_command(tmp_path, f"to_nanochat={target}", "run_name=b")
    meta = nanochat.read_meta(target)
    assert (meta["total_batch_size"], meta["max_seq_len"]) == (2048, 256)


def test_a_folder_or_a_lone_model_file_say_what_is_missing(tmp_path, checkpoint):
    path, _ = checkpoint
    with pytest.raises(ValueError, match=r"d4 is a folder; name its model file, .*d4/model_000007"):
        run_command(tmp_path, f"from_nanochat={path.parent}", "run_name=a")
    path.with_name("meta_000007.json").unlink()
    with pytest.raises(ValueError, match=r"meta_000007.json.*; copy it from where model_000007"):
        run_command(tmp_path, f"from_nanochat={path}", "run_name=a")
    with pytest.raises(ValueError, match=r"nowhere/config.json; name the folder of a model"):
        run_command(tmp_path, f"from_huggingface={tmp_path / 'nowhere'}", "run_name=a")


def test_command_brings_the_tokenizer(tmp_path, checkpoint):
    path, _ = checkpoint
    folder = tmp_path / "nanochat/tokenizer"
    folder.mkdir()
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding()))
    with pytest.raises(ValueError, match="has 267 tokens but the model has 250"):
        run_command(tmp_path, f"from_nanochat={path}", "run_name=a")
    assert not (tmp_path / "runs/a").exists()
    meta = nanochat.read_meta(path)
    meta["model_config"]["vocab_size"] = 267
    arrays = {
        name: np.zeros((320, a.shape[1]), a.dtype) if a.shape[0] == 256 and "h." not in name else a
        for name, a in tensor_files.read_tensors(path).items()
    }
    nanochat.write_checkpoint(path, arrays, meta)
    run_command(tmp_path, f"from_nanochat={path}", "run_name=a")
    config = pyconfig.initialize([str(tmp_path / "runs/a/config.yml")])
    found = load_tokenizer(config)
    assert found.encode("the") == [257]
    with Checkpointer(config, tmp_path / "runs/a", writer=False) as checkpointer:
        assert checkpointer.read_extra()["run"]["tokenizer"] == found.fingerprint()


@pytest.mark.parametrize(
    "words,message",
    [
        (["max_target_length=512"], "max_target_length is 512 on the command line but 256 in"),
        (["model=d6"], "num_decoder_layers is 6 on the command line but 4 in"),
        (["window_pattern=L"], "window_pattern is L on the command line but SSSL in"),
        (["smear_gate_channels=0"], "smear_gate_channels is 0 on the command line but 24 in"),
        (["rope_theta=10000"], "rope_theta is 10000.0 on the command line but 100000.0 in"),
    ],
)
def test_the_command_line_cannot_contradict_the_checkpoint(tmp_path, checkpoint, words, message):
    with pytest.raises(ValueError, match=message):
        run_command(tmp_path, f"from_nanochat={checkpoint[0]}", "run_name=a", *words)
    assert not (tmp_path / "runs/a").exists()


def test_tables_may_widen_but_lose_no_digits(tmp_path, checkpoint):
    path, arrays = checkpoint
    run_command(tmp_path, f"from_nanochat={path}", "run_name=wide", "embedding_dtype=float32")
    run_command(tmp_path, f"to_nanochat={tmp_path}/model_1.npz", "run_name=wide")
    wide = tensor_files.read_tensors(tmp_path / "model_1.npz")
    assert wide["transformer.wte.weight"].dtype == np.float32
    for name, array in arrays.items():
        np.testing.assert_array_equal(wide[name], array.astype(np.float32))
    nanochat.write_checkpoint(path, golden()[0], nanochat.read_meta(path))
    with pytest.raises(ValueError, match="token_embed is float32 .* would lose digits"):
        run_command(tmp_path, f"from_nanochat={path}", "run_name=b", "embedding_dtype=bfloat16")


@pytest.mark.parametrize(
    "words,message",
    [
        (["rope_theta=10000"], "rope_theta is 10000.0, in nanochat 100000.0"),
        (["use_backout=false"], "use_backout is False, in nanochat True"),
        (["max_target_length=2048", "short_window_fraction=0.5"], "short windows"),
    ],
)
def test_models_that_nanochat_cannot_run_are_not_exported(words, message):
    nanochat.check_exportable(golden_config())
    with pytest.raises(ValueError, match=message):
        nanochat.check_exportable(golden_config(*words))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda m: m["model_config"].pop("n_embd"), "n_embd"),
        (lambda m: m["model_config"].update(n_layer="4"), "model_config.n_layer is '4'"),
        (lambda m: m["model_config"].update(n_head=3), "n_embd is not a multiple of n_head"),
        (lambda m: m.pop("model_config"), "model_config"),
        (lambda m: m.update(step=-1), "step -1"),
        (lambda m: m["model_config"].update(window_pattern="SX"), "window_pattern is 'SX'"),
        (lambda m: m["model_config"].update(window_pattern=None), "window_pattern is None"),
    ],
)
def test_bad_metadata_is_one_line(tmp_path, checkpoint, change, message):
    meta_path = checkpoint[0].with_name("meta_000007.json")
    meta = json.loads(meta_path.read_text())
    change(meta)
    meta_path.write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=message) as caught:
        run_command(tmp_path, f"from_nanochat={checkpoint[0]}", "run_name=a")
    assert "\n" not in str(caught.value)


def test_a_run_older_than_an_architecture_key_is_exported(tmp_path, checkpoint, monkeypatch):
    """It has the value that such runs imply; with another value nanochat cannot run the model."""
    path, arrays = checkpoint
    run_command(tmp_path, f"from_nanochat={path}", "run_name=a")
    keys = {**scaling.ARCHITECTURE_KEYS, "mlp_activation": "relu2"}
    monkeypatch.setattr(scaling, "ARCHITECTURE_KEYS", keys)
    argv = [BASE, f"base_output_directory={tmp_path / 'runs'}", "run_name=a"]
    config = pyconfig.initialize(argv)
    newer = pyconfig.FrozenConfigDict({**config.to_dict(), "mlp_activation": "swiglu"})
    saved, _, step = convert._read_run(newer, argv, nanochat.check_exportable)
    assert (saved.mlp_activation, step) == ("relu2", 7)
    with pytest.raises(ValueError, match="mlp_activation is swiglu, in nanochat relu2"):
        nanochat.check_exportable(newer)


def test_an_unknown_run_is_named_with_similar_ones(tmp_path, checkpoint):
    run_command(tmp_path, f"from_nanochat={checkpoint[0]}", "run_name=small")
    for target in (f"to_nanochat={tmp_path}/model_1.npz", f"to_huggingface={tmp_path}/model"):
        with pytest.raises(ValueError, match=r"smal holds no checkpoint: .*did you mean small\?"):
            run_command(tmp_path, target, "run_name=smal")


@pytest.mark.parametrize("path", ["weights.npz", "model_1.bin", "model_1"])
def test_badly_named_targets_are_refused_before_anything_is_read(tmp_path, path):
    with pytest.raises(ValueError, match="must"):
        run_command(tmp_path, f"to_nanochat={tmp_path / path}", "run_name=none")


def test_errors_are_one_line_and_code_2(tmp_path):
    words = ["configs/base.yml", f"from_nanochat={tmp_path}/model_1.npz"]
    done = programs.run("MaxNano/convert.py", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: there is no ") and done.stderr.count("\n") == 1
