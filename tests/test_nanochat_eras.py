"""Checkpoints of every era of nanochat, and of transformers' NanoChatForCausalLM, compute the logits
that their own code computes: recordings in golden/nanochat_eras.json.
"""

import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_convert import BASE, logits_of, run_command

from MaxNano import pyconfig
from MaxNano.interop import huggingface, nanochat, parameters, tensor_files
from MaxNano.models import transformer
from MaxNano.models.layers import rotary_tables
from MaxNano.training.checkpointing import Checkpointer

GOLDEN = Path(__file__).resolve().parent / "golden"
RECORDED = json.loads((GOLDEN / "nanochat_eras.json").read_text())
ERAS = [era for era in RECORDED if era != "transformers"]
# Of the code whose checkpoints do not tell what it was.
SAID = {"2026-02-05": {"logits_soft_cap": 15.0}, "2026-03-04": {"logits_soft_cap": 20.0}}

spec = importlib.util.spec_from_file_location("record", GOLDEN / "record_nanochat_eras.py")
record = importlib.util.module_from_spec(spec)
spec.loader.exec_module(record)


def checkpoint(era) -> tuple[dict, dict]:
    """(metadata, tensors) as that era's code saves them."""
    model = dict(RECORDED[era]["model_config"])
    return {"step": 3, "model_config": model}, record.weights(RECORDED[era]["shapes"])


def logits(values, arrays, names) -> np.ndarray:
    words = [f"{key}={str(v).lower() if v in (True, False) else v}" for key, v in values.items()]
    config = pyconfig.initialize([BASE, *words])
    params = parameters.to_params(arrays, config, names)
    return logits_of(config, params, record.tokens())[0, :: record.STRIDE]


def difference(values, arrays, era, names=nanochat.NAMES) -> float:
    """The largest difference to the recorded logits."""
    return np.abs(logits(values, arrays, names) - np.array(RECORDED[era]["logits"])).max()


@pytest.mark.parametrize("era", ERAS)
def test_each_era_has_its_logits(era, monkeypatch):
    meta, arrays = checkpoint(era)
    values = nanochat.config_values(meta, arrays, SAID.get(era, {}))
    # nanochat rounds its rotary tables to bfloat16 until March 2026; MaxNano's are float32.
    if era < "2026-03-04":
        assert 1e-3 < difference(values, arrays, era) < 0.1

        def rounded(*arguments):
            return [
                table.astype(jnp.bfloat16).astype(np.float32) for table in rotary_tables(*arguments)
            ]

        monkeypatch.setattr(transformer, "rotary_tables", rounded)
    assert difference(values, arrays, era) < 1e-4


@pytest.mark.parametrize(
    "era,key,value",
    [
        ("2026-02-05", "logits_soft_cap", 20.0),
        ("2026-03-09", "qk_norm_scale", 1.2),
        ("2026-03-09", "short_window_fraction", 0.5),
        ("2026-01-08", "rope_theta", 100000.0),
    ],
)
def test_the_constants_of_another_era_are_another_model(era, key, value):
    meta, arrays = checkpoint(era)
    values = nanochat.config_values(meta, arrays, SAID.get(era, {}))
    assert difference({**values, key: value}, arrays, era) > 0.1


def test_what_a_checkpoint_does_not_tell_is_asked_for():
    meta, arrays = checkpoint("2026-02-05")
    for given in ({}, {"logits_soft_cap": 30.0}):
        with pytest.raises(
            ValueError, match="pass logits_soft_cap=15.0 .* or logits_soft_cap=20.0"
        ):
            nanochat.config_values(meta, arrays, given)
    meta, arrays = checkpoint("2026-01-16")
    del meta["model_config"]["window_pattern"]
    with pytest.raises(ValueError, match="does not say window_pattern: pass window_pattern=SSSL"):
        nanochat.config_values(meta, arrays, {})
    values = nanochat.config_values(meta, arrays, {"window_pattern": "L"})
    assert values["window_pattern"] == "L"


@pytest.mark.parametrize("change", ["gate", "backout", "engram"])
def test_tensors_of_no_era_are_refused(change):
    meta, arrays = checkpoint("head")
    if change == "gate":
        gates = (name for name in arrays if name.endswith("ve_gate.weight"))
        arrays |= {name: np.zeros((2, 16), np.float32) for name in gates}
    elif change == "backout":
        del arrays["backout_lambda"]
    else:  # of some days of January 2026
        arrays["engrams.1.weight"] = np.zeros((64, 64), np.float32)
    with pytest.raises(ValueError, match="no version of nanochat|which this model does not have"):
        logits(nanochat.config_values(meta, arrays, {}), arrays, nanochat.NAMES)


def test_the_command_prints_what_it_found_and_trains_on(tmp_path, capsys):
    """A table that is not padded, as in October 2025, and bfloat16 as a GPU saves it."""
    meta, arrays = checkpoint("2025-10-20")
    assert arrays["lm_head.weight"].shape == (100, 64)
    arrays["transformer.wte.weight"] = arrays["transformer.wte.weight"].astype(jnp.bfloat16)
    path = tmp_path / "model_000003.npz"
    nanochat.write_checkpoint(path, arrays, meta)
    run_command(tmp_path, f"from_nanochat={path}", "run_name=old")
    printed = capsys.readouterr().out
    for found in ("nanochat of 2025-10-13", "rope_theta=10000.0", "qk_norm_scale=1.0"):
        assert found in printed
    config = pyconfig.initialize([str(tmp_path / "runs/old/config.yml")])
    assert (config.rope_theta, config.window_pattern, config.use_backout) == (10000.0, "L", False)
    with Checkpointer(config, tmp_path / "runs/old", writer=False) as checkpointer:
        params, _ = checkpointer.restore_params_only()
    assert set(params) == {"token_embed", "lm_head", "layers", "resid_lambdas", "x0_lambdas"}
    assert params["token_embed"].shape == (128, 64)
    with pytest.raises(
        ValueError, match="nanochat cannot run this model: value_embed_gate_channels is 0"
    ):
        run_command(tmp_path, f"to_nanochat={tmp_path}/out/model_1.npz", "run_name=old")


# ---- transformers' own NanoChatForCausalLM ------------------------------------------------------


def folder(path: Path, **changes) -> Path:
    """What its save_pretrained writes."""
    path.mkdir()
    content = {**RECORDED["transformers"]["config"], **changes}
    (path / "config.json").write_text(json.dumps(content))
    arrays = record.weights(RECORDED["transformers"]["shapes"])
    tensor_files.write_tensors(path / "model.safetensors", arrays)
    return path


def test_the_nanochat_of_transformers_has_its_logits(tmp_path, capsys):
    path = folder(tmp_path / "model")
    content = huggingface.read_folder(path)
    arrays = tensor_files.read_tensors(content.weights[0])
    assert difference(content.values, arrays, "transformers", content.names) < 1e-4
    run_command(tmp_path, f"from_huggingface={path}", "run_name=a", "chat_turns=true")
    printed = capsys.readouterr().out
    assert "NanoChatForCausalLM: " in printed and "rope_theta=20000.0" in printed
    config = pyconfig.initialize([str(tmp_path / "runs/a/config.yml")])
    assert (config.logits_soft_cap, config.norm_epsilon, config.chat_turns) == (12.0, 1e-6, True)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ],
)
def test_options_that_the_model_does_not_have_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        huggingface.read_folder(folder(tmp_path / "model", **changes))


def test_older_configs_hold_the_rotary_base_in_other_places(tmp_path):
    older = {"rope_parameters": None, "rope_theta": 5000.0}
    assert huggingface.read_folder(folder(tmp_path / "a", **older)).values["rope_theta"] == 5000.0
    none = {"rope_parameters": None}
    assert huggingface.read_folder(folder(tmp_path / "b", **none)).values["rope_theta"] == 10000.0
