"""What a run is made of: keys that may change, fingerprints of data, the history, the processes."""

import json
import os
from pathlib import Path

import pytest

from MaxNano import config_schema, pyconfig, train_tokenizer
from MaxNano.data import fingerprint
from MaxNano.data.manifest import MANIFEST
from MaxNano.reporting.run_history import Run
from MaxNano.reporting.starts import section
from MaxNano.storage import history
from MaxNano.training import config_changes, run_record
from MaxNano.training.config_changes import FREE_KEYS, HOST_KEYS, ConfigChanged, result_keys

BASE = str(Path(__file__).parents[1] / "configs/base.yml")


def config_of(*words):
    return pyconfig.initialize([BASE, "model=d2", *words])


# ---- Keys ---------------------------------------------------------------------------------------


def test_every_key_of_training_changes_numbers_unless_it_is_free():
    """A new key changes numbers until config_changes.py says that it does not."""
    keys = config_schema.base_keys()
    assert {name for name in FREE_KEYS if "train" not in keys[name].programs} == set()
    assert HOST_KEYS < FREE_KEYS
    assert set(fingerprint.ROW_KEYS) - FREE_KEYS == {*fingerprint.ROW_KEYS} - {"skip_corrupt_data"}
    assert {"seed", "steps", "matrix_lr", "num_decoder_layers", "rl_kl"} < result_keys()
    assert "temperature" not in result_keys(), "train.py does not read it"


def saved(config, **more):
    """What a checkpoint has of a config, as JSON."""
    values = {key: config[key] for key in pyconfig.keys_of(config)}
    run = {"config": json.loads(json.dumps(values)), "step": 5}
    return {"run": run, "metrics": {"run_id": "abc"}, **more}


def test_keys_that_change_numbers_are_refused_and_others_are_free():
    extra = saved(config_of())
    free = ("log_interval=5", "num_cpu_devices=2", "remat_policy=full", "data_workers=2")
    assert config_changes.check_resume(config_of(*free, "eval_interval=3"), extra, {}) == {}
    config = config_of("seed=3", "muon_beta2=0.5", "lm_head_betas=[0.7, 0.9]")
    with pytest.raises(ConfigChanged) as caught:
        config_changes.check_resume(config, extra, {})
    assert "seed=3 instead of 42, muon_beta2=0.5 instead of 0.9, lm_head_betas=[0.7, 0.9]" in str(
        caught.value
    )
    config = config_of("seed=3", "allow_config_change=true")
    assert config_changes.check_resume(config, extra, {}) == {"seed": (42, 3)}
    assert "\n" not in str(caught.value)


def test_what_was_imported_may_be_trained_on_in_any_way():
    extra = saved(config_of()) | {"metrics": None, "imported_from": "model.pt"}
    assert config_changes.check_resume(config_of("seed=3"), extra, {}) == {}


def test_a_longer_horizon_is_another_schedule():
    with pytest.raises(ConfigChanged, match="steps=20 instead of 10"):
        config_changes.check_resume(config_of("steps=20"), saved(config_of("steps=10")), {})


def test_a_checkpoint_of_an_earlier_version_had_the_default_of_a_new_key():
    extra = saved(config_of())
    del extra["run"]["config"]["muon_renormalize"], extra["run"]["config"]["allow_config_change"]
    assert config_changes.check_resume(config_of(), extra, {}) == {}
    with pytest.raises(ConfigChanged, match="muon_renormalize=false instead of true"):
        config_changes.check_resume(config_of("muon_renormalize=false"), extra, {})


def test_an_allowed_change_makes_other_parameters():
    """Results of the same step before the change do not count after it."""
    extra = saved(config_of())
    assert config_changes.parameters_id(extra) == "abc"
    suffix = config_changes.changes_suffix("", 5, {"seed": (42, 3)})
    assert suffix != config_changes.changes_suffix("", 6, {"seed": (42, 3)})
    assert config_changes.changes_suffix(suffix, 7, {}) == suffix
    assert config_changes.parameters_id(extra | {"inputs": {"changes": suffix}}) == "abc" + suffix
    assert config_changes.parameters_id({"metrics": None}) is None


def test_another_run_under_the_name_of_load_from_is_refused(tmp_path):
    start = tmp_path / "start/checkpoints/3"
    (start / "extra").mkdir(parents=True)
    (start / "MANIFEST.json").write_text("{}")
    config = config_of("load_from=start", f"base_output_directory={tmp_path}")
    extra = saved(config, inputs={"start": {"run": "first", "step": 3}})
    for run_id, is_same in (("first", True), ("first-0123", True), ("second", False)):
        content = json.dumps({"metrics": {"run_id": run_id}})
        (start / "extra/metadata").write_text(content)
        if is_same:
            assert config_changes.check_resume(config, extra, {}) == {}
            continue
        with pytest.raises(ConfigChanged, match="is another run now than the one that it started"):
            config_changes.check_resume(config, extra, {})


# ---- Data ---------------------------------------------------------------------------------------


def write_text(folder, *names, size=1):
    folder.mkdir()
    for name in names:
        line = json.dumps({"text": f"a document of {name} " * 8}) + "\n"
        (folder / name).write_text(line * size)
    return folder


def contents(folder, *words):
    return fingerprint.contents_of_run(
        config_of("dataset_type=jsonl", f"dataset_path={folder}", *words)
    )


def replace_bytes(path, offset, content):
    """Changes a file in place; size and time stay."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        file.write(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_data_are_what_they_contain(tmp_path):
    before = contents(write_text(tmp_path / "a", "0.jsonl", "1.jsonl", "2.jsonl"))
    assert list(before["train"]) == ["0.jsonl", "1.jsonl"]
    assert contents((tmp_path / "a").rename(tmp_path / "b")) == before
    replace_bytes(tmp_path / "b/1.jsonl", 12, b"X")
    now = contents(tmp_path / "b")
    problem = "in the training data 1.jsonl has changed"
    assert fingerprint.run_difference(before, now) == problem
    assert fingerprint.run_difference(now, now) is None
    write_text(tmp_path / "c", "1.jsonl", "2.jsonl")
    problem = "in the training data 0.jsonl is missing"
    assert fingerprint.run_difference(before, contents(tmp_path / "c")) == problem
    assert "validation" not in contents(tmp_path / "c", "eval_interval=0")


@pytest.mark.parametrize("offset", [0, -1])
def test_of_a_large_file_blocks_are_read(tmp_path, offset):
    folder = write_text(tmp_path / "large", "0.jsonl", "1.jsonl", size=8000)
    assert (folder / "0.jsonl").stat().st_size > fingerprint.WHOLE_BYTES
    before = contents(folder)
    replace_bytes(folder / "0.jsonl", offset, b"X")
    assert "0.jsonl has changed" in fingerprint.run_difference(before, contents(folder))


def test_a_shard_is_known_before_it_arrives(tmp_path):
    folder = write_text(tmp_path / "hub", "0.jsonl", "1.jsonl", "2.jsonl")
    facts = {
        path.name: {"size": path.stat().st_size, "sha256": path.name * 9, "done": True}
        for path in sorted(folder.iterdir())
    }
    (folder / MANIFEST).write_text(json.dumps({"files": facts}))
    complete = contents(folder)
    facts["1.jsonl"]["done"] = False
    (folder / MANIFEST).write_text(json.dumps({"files": facts}))
    (folder / "1.jsonl").unlink()
    assert contents(folder) == complete
    facts["1.jsonl"]["sha256"] = "other"
    (folder / MANIFEST).write_text(json.dumps({"files": facts}))
    assert "1.jsonl has changed" in fingerprint.run_difference(complete, contents(folder))


def test_conversations_and_mixtures_are_what_they_contain(tmp_path):
    talks = tmp_path / "talks.jsonl"
    message = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talks.write_text(json.dumps(message) + "\n")
    mixture = f"[[json:{talks}, 1], [SimpleSpelling/train, 1]]"
    words = ("stage=sft", f"chat_train_mixture={mixture}", "load_from=x", "eval_interval=0")
    before = fingerprint.contents_of_run(config_of(*words))
    assert fingerprint.contents_of_run(config_of(*words)) == before
    replace_bytes(talks, -5, b"c")
    now = fingerprint.contents_of_run(config_of(*words))
    assert now["train"]["SimpleSpelling/train"] == before["train"]["SimpleSpelling/train"]
    assert f"json:{talks} has changed" in fingerprint.run_difference(before, now)

    folder = write_text(tmp_path / "a", "0.jsonl", "1.jsonl")
    words = ("dataset_type=mixture", f"dataset_mixture=[[1, jsonl:{folder}], [1, synthetic]]")
    found = fingerprint.contents_of_run(config_of(*words))
    assert list(found["train"]) == ["part 1: 0.jsonl", "part 2: synthetic"]


def test_a_tokenizer_knows_what_it_was_trained_on(tmp_path):
    folder = write_text(tmp_path / "text", "0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl")
    words = (
        "dataset_type=jsonl",
        f"dataset_path={folder}",
        f"tokenizer_path={tmp_path}/tokenizer",
        "vocab_size=270",
        "tokenizer_train_characters=200",  # of the first two files
    )
    config = config_of(*words)
    trained, inputs = train_tokenizer.train(config)
    trained.save(config.tokenizer_path)
    train_tokenizer.check_inputs(config)  # unknown passes
    path = tmp_path / "tokenizer" / train_tokenizer.INPUTS
    path.write_text(json.dumps(inputs))
    assert list(inputs["files"]) == ["0.jsonl", "1.jsonl"]
    train_tokenizer.check_inputs(config)
    (folder / "4.jsonl").write_text((folder / "3.jsonl").read_text())  # one more shard is fine
    train_tokenizer.check_inputs(config)
    path.write_text(json.dumps(inputs | {"all_files": True}))  # it would have read that shard
    with pytest.raises(ValueError, match=r"2\.jsonl is new"):
        train_tokenizer.check_inputs(config)
    path.write_text(json.dumps(inputs))
    with pytest.raises(ValueError, match="tokenizer_train_characters=300 instead of 200"):
        train_tokenizer.check_inputs(config_of(*words, "tokenizer_train_characters=300"))
    replace_bytes(folder / "1.jsonl", 12, b"X")
    with pytest.raises(ValueError, match=r"1\.jsonl has changed; set another tokenizer_path"):
        train_tokenizer.check_inputs(config)


# ---- The history --------------------------------------------------------------------------------


def test_a_history_survives_a_line_that_was_cut(tmp_path):
    history.append(tmp_path, "start", {"step": 0})
    with (tmp_path / history.HISTORY).open("a") as file:
        file.write('{"event": "end", "sta')
    history.append(tmp_path, "start", {"step": 4})
    assert [entry["step"] for entry in history.read(tmp_path)] == [0, 4]
    assert history.read(tmp_path / "nowhere") == []


def test_a_history_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / history.HISTORY).mkdir()
    history.append(tmp_path, "start", {"step": 0})
    assert capsys.readouterr().err.startswith("warning: ")


def test_the_report_shows_every_start(tmp_path):
    start = {"versions": {"commit": "c" * 40}, "devices": {"count": 2, "kind": "cpu"}}
    entries = [
        {"event": "start", "time": "t1", "step": 0, "changes": {"steps": [None, 9]}, **start},
        {"event": "end", "time": "t2", "step": 4, "status": "preempted"},
        {"event": "start", "time": "t3", "step": 4, "changes": {}, **start},
        {"event": "refused", "time": "t4", "step": 4, "error": "seed=7 instead of 42"},
        {"event": "start", "time": "t5", "step": 4, "changes": {"seed": [42, 7]}, **start},
        {"event": "end", "time": "t6", "status": "failed", "error": "no data"},
    ]
    run = Run(tmp_path, {"stage": None}, {}, [], [], {}, [], [], entries)
    (table,) = section([run]).blocks
    commit = "c" * 12
    assert table.rows == [
        ["t1", "0", "preempted at step 4", commit, "2 x cpu", "–"],
        ["t3", "4", "not recorded: killed, or running", commit, "2 x cpu", "–"],
        ["t4", "4", "refused: seed=7 instead of 42", "–", "–", "–"],
        ["t5", "4", "failed: no data", commit, "2 x cpu", "seed: 42 → 7"],
    ]


# ---- Processes ----------------------------------------------------------------------------------


def test_processes_with_other_code_are_refused():
    values = [{"commit": "a", "jax": "1"}, {"commit": "b", "jax": "1"}]
    with pytest.raises(ValueError, match="process 1 has commit=b instead of a in process 0"):
        run_record._compare("versions", values)
    run_record._compare("versions", values[:1] * 2)
