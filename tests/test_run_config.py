"""`run_name` alone names a run, for every program that uses it."""

import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from MaxNano import chat, pyconfig, report, serve, train
from MaxNano.training.run_config import config_of_run, require_start

ROOT = Path(__file__).resolve().parents[1]
BASE = str(ROOT / "configs/base.yml")


@pytest.fixture
def runs(tmp_path):
    """A folder with two runs, each with its config and an empty checkpoint."""
    for name, words in {
        "small_sft": ["model=d2", "stage=sft", "tokenizer_path=elsewhere", "temperature=0.3"],
        "large": ["model=d6", "num_processes=2", "process_id=0", "coordinator_address=here:1"],
    }.items():
        config = pyconfig.initialize([BASE, f"run_name={name}", "max_target_length=512", *words])
        (tmp_path / name / "checkpoints/7").mkdir(parents=True)
        pyconfig.save(config, tmp_path / name / "config.yml")
    (tmp_path / "empty").mkdir()
    return tmp_path


def read(runs, *words):
    argv = [BASE, f"base_output_directory={runs}", *words]
    return config_of_run(pyconfig.initialize(argv), argv)


def test_the_name_is_enough(runs):
    """All values are the run's, except those of the command line and where the folder is now."""
    config = read(runs, "run_name=small_sft", "top_k=3")
    assert (config.num_decoder_layers, config.stage, config.tokenizer_path) == (
        2,
        "sft",
        "elsewhere",
    )
    assert (config.max_target_length, config.temperature, config.top_k) == (512, 0.3, 3)
    assert config.base_output_directory == str(runs)
    argv = [str(runs / "small_sft/config.yml"), f"base_output_directory={runs}", "top_k=3"]
    others = [
        read(runs, "model=d2", "stage=sft", "run_name=small_sft", "top_k=3"),
        config_of_run(pyconfig.initialize(argv), argv),
    ]
    for other in others:
        assert all(other[key] == config[key] for key in pyconfig.keys_of(config))


def test_the_processes_of_training_are_not_those_of_now(runs):
    config = read(runs, "run_name=large")
    assert (config.num_processes, config.process_id, config.coordinator_address) == (None,) * 3
    words = ["num_processes=4", "process_id=3", "coordinator_address=there:2"]
    assert read(runs, "run_name=large", *words).process_id == 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["run_name=small_sf"],
            "small_sf holds no checkpoint: give run_name .*; did you mean small_sft",
        ),
        (["run_name=zzzzzz"], "; runs with a checkpoint: large, small_sft$"),
        (["run_name=empty"], "empty holds no checkpoint"),
        ([], "d4 holds no checkpoint"),
        (["run_name=large", "model=d2"], "was trained with model=d6: leave out model=d2"),
    ],
)
def test_a_wrong_name_is_one_line(runs, words, told):
    with pytest.raises(ValueError, match=told):
        read(runs, *words)


def test_the_config_of_a_folder_that_was_moved_says_what_to_add(runs):
    """It names the folder of then, and the line named only that one."""
    words = [str(runs / "small_sft/config.yml")]
    told = f"; {words[0]} was moved: add base_output_directory={runs} run_name=small_sft$"
    with pytest.raises(ValueError, match=told):
        config_of_run(pyconfig.initialize(words), words)
    with pytest.raises(ValueError, match=told):
        report.main(pyconfig.initialize(words), words)
    words += [f"base_output_directory={runs}", "run_name=small_sft"]
    assert config_of_run(pyconfig.initialize(words), words).temperature == 0.3


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "small_sf",
            "load_from=small_sf: .*small_sf holds no checkpoint; did you mean small_sft[?]",
        ),
        ("empty", "load_from=empty: .*empty holds no checkpoint; runs with a checkpoint: large, s"),
        (
            "small_sft",
            "=nowhere does not exist; load_from=small_sft has elsewhere: begin with .*yml",
        ),
    ],
)
def test_a_start_without_a_checkpoint_is_told_before_anything_is_read(runs, name, told):
    """The tokenizer was missed first, and the conversations were counted."""
    words = ["configs/base.yml", "model=d2", "stage=sft", f"base_output_directory={runs}"]
    words += ["tokenizer_path=nowhere", "chat_train_mixture=[[json:nowhere.jsonl, 1]]"]
    config = pyconfig.initialize([*words, f"load_from={name}", "run_name=new"])
    with pytest.raises(ValueError, match=told):
        train.main(config)
    for words_of_resumed in (["run_name=large"], ["run_name=new", "dry_run=true"]):
        require_start(pyconfig.initialize([*words, f"load_from={name}", *words_of_resumed]))


@pytest.mark.parametrize("program", [chat, serve], ids=["chat", "serve"])
def test_chat_and_serve_read_the_runs_config(runs, program, monkeypatch):
    """They failed, and advised to train a new tokenizer."""
    loaded = []
    monkeypatch.setattr(chat, "load", loaded.append)
    monkeypatch.setattr(chat.terminal_chat, "run_plain", lambda config, engine: 0)
    monkeypatch.setattr(serve, "bind", lambda host, port: None)
    monkeypatch.setattr(serve, "serve", lambda app, bound, seconds, load: load())
    monkeypatch.setattr(serve, "log_to_stderr", lambda: None)
    monkeypatch.setattr(serve, "load", lambda models, configs: loaded.extend(configs))
    argv = [BASE, f"base_output_directory={runs}", "run_name=small_sft"]
    argv += ["prompt=hi"] if program is chat else ["serve_runs=[large,small_sft]"]
    program.main(pyconfig.initialize(argv), argv)
    assert [(each.run_name, each.num_decoder_layers) for each in loaded] == (
        [("small_sft", 2)] if program is chat else [("large", 6), ("small_sft", 2)]
    )


def test_the_quickstarts_last_lines_chat_by_name(tmp_path, monkeypatch):
    script = (ROOT / "end_to_end/cpu/quickstart.sh").read_text()
    program = script.partition("<<'PY'\n")[2].partition("\nPY\n")[0]
    rows = [{"event": "validation", "bpb": 2.0}, {"step": 0}]
    (tmp_path / "runs/quick/checkpoints/1").mkdir(parents=True)
    (tmp_path / "runs/quick/metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/quick_sft/checkpoints/1").mkdir(parents=True)
    words = ["-", "runs/quick", "runs/quick_sft", "text", "tokenizer", "words"]
    monkeypatch.setattr(sys, "argv", words)
    with redirect_stdout(io.StringIO()) as out:
        exec(program, {})
    [words] = re.findall(r"MaxNano/chat.py configs/base.yml (.*)", out.getvalue())
    assert config_of_run(pyconfig.initialize([BASE, words]), [BASE, words]).run_name == "quick_sft"
    assert "runs/quick_sft/report.html" in out.getvalue()
    # The set-up of the quickstart has no packages of the server.
    assert re.search(r"EXTRAS=serve bash setup.sh\n.*MaxNano/serve.py", out.getvalue())
