"""The server while it loads, and with several models."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from serving import Server, wait_until

from MaxNano import pyconfig
from MaxNano.distributed import hardware
from MaxNano.inference.memory import check_memory
from MaxNano.serving.app import make_models_app
from MaxNano.serving.models import Models

ROOT = Path(__file__).resolve().parents[1]


def config_of(name):
    return pyconfig.initialize(["configs/base.yml", f"run_name={name}", "chat_turns=true"])


def engine_of(text, **more):
    return FakeEngine(lambda request, sample: text.encode(), **more)


def get(server, path):
    """(status, headers, object) of an answer."""
    status, headers, content = server.request("GET", path)
    return status, headers, json.loads(content)


def test_health_tells_loading_from_ready():
    models = Models(config_of("a"), ["a", "b"])
    with Server(None, app=make_models_app(models), config=config_of("a")) as server:
        models.set_progress("reading the checkpoint of a")
        status, headers, health = get(server, "/health")
        assert status == 503 and headers["retry-after"] == "1"
        assert health == {
            "status": "loading",
            "progress": "reading the checkpoint of a",
            "models": {"a": "loading", "b": "loading"},
        }
        assert get(server, "/v1/models")[0] == 503
        status, answer = server.chat()
        assert status == 503 and answer["error"]["code"] == "model_loading"
        assert "reading the checkpoint of a" in answer["error"]["message"]
        assert server.request("GET", "/")[0] == 200, "the page is there and asks again"

        models.add(config_of("a"), engine_of("I am a"))
        assert get(server, "/health")[2]["models"] == {"a": "ready", "b": "loading"}
        assert server.chat()[0] == 200 and server.chat(model="b")[0] == 503
        models.add(config_of("b"), engine_of("I am b"))
        assert get(server, "/health")[::2] == (200, {"status": "ok"})
        assert server.chat(model="b")[0] == 200


def test_a_request_chooses_its_model():
    models = Models(config_of("a"), ["a", "b"])
    engines = {"b": engine_of("I am b", max_length=256), "a": engine_of("I am a", slots=2)}
    for name, engine in engines.items():  # in another order than their names
        models.add(config_of(name), engine)
    with Server(None, app=make_models_app(models), config=config_of("a")) as server:
        listed = get(server, "/v1/models")[2]["data"]
        assert [(row["id"], row["max_model_len"]) for row in listed] == [("a", 512), ("b", 256)]
        assert get(server, "/v1/models/b")[2]["id"] == "b"
        for words, expected in (({"model": "a"}, "a"), ({"model": "b"}, "b"), ({}, "a")):
            status, answer = server.chat(**words)
            assert status == 200 and answer["model"] == expected
            assert answer["choices"][0]["message"]["content"] == f"I am {expected}"
        assert [len(engines[name].requests) for name in "ab"] == [2, 1]
        status, answer = server.chat(model="c")
        assert status == 404 and "the models of this server are a, b" in answer["error"]["message"]
        assert server.chat(model=["a"])[0] == 400
        body = {"model": "b", "prompt": "xy"}
        answer = json.loads(server.request("POST", "/tokenize", body)[2])
        assert answer["max_model_len"] == 256
        metrics = server.request("GET", "/metrics")[2].decode()
        assert "maxnano_slots 6.0" in metrics


def test_a_full_model_does_not_close_the_other():
    models = Models(pyconfig.replace(config_of("a"), "test", serve_queue=0), ["a", "b"])
    for name in "ab":
        config = pyconfig.replace(config_of(name), "test", serve_queue=0)
        models.add(config, engine_of(name, slots=1))
    models.services["a"].pending = models.services["a"].capacity
    with Server(None, app=make_models_app(models), config=config_of("a")) as server:
        assert server.chat(model="b")[0] == 200
        assert server.chat(model="a")[0] == 429


def test_programs_are_compiled_while_the_engine_is_idle():
    """A request waits for one program at most."""
    engine = engine_of("hi", programs=[f"program {i}" for i in range(20)], compile_seconds=0.05)
    models = Models(config_of("a"), ["a"])
    models.add(config_of("a"), engine, iter(engine.compile_programs()))
    with Server(engine, app=make_models_app(models), config=config_of("a")) as server:
        assert server.chat()[0] == 200
        assert len(engine.compiled) < 20
        wait_until(lambda: len(engine.compiled) == 20)
        assert server.chat()[0] == 200


# serve.py with an engine that is ready when a file appears, or cannot be loaded.
SERVE = """
import sys, time
from pathlib import Path
from fake_engine import FakeEngine
from MaxNano import pyconfig, serve
from MaxNano.storage.files import read_text
from MaxNano.training import loading

def load_engine(config, streams):
    while not Path("go").exists():
        time.sleep(0.01)
    if Path("go").read_text():
        read_text(Path("go").read_text(), "the tokenizer")
    return FakeEngine(lambda request, sample: config.run_name.encode(), programs=["a", "b", "c"])

loading.load_engine = load_engine
argv = ["ROOT/configs/base.yml", "serve_runs=[one,two]", "serve_port=0", "jax_cache_dir=''"]
sys.exit(pyconfig.launch(lambda config: serve.main(config, argv), argv))
""".replace("ROOT", str(ROOT))


def ask(url, body=None):
    """(status, object) of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=200) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize("problem", ["", "nowhere"], ids=["ready", "failing"])
def test_serve_answers_while_it_loads(tmp_path, problem):
    for name in ("one", "two"):
        (tmp_path / f"runs/{name}/checkpoints/1").mkdir(parents=True)
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    try:
        line = process.stdout.readline()
        url = re.search(r"Loading one, two; (http://\S+)/health", line)[1]
        status, health = ask(f"{url}/health")
        assert status == 503 and health["status"] == "loading"
        (tmp_path / "go").write_text(problem)
        if problem:
            assert process.wait(200) == 2
            [line] = process.stderr.read().splitlines()
            assert line.startswith("error: the tokenizer cannot be read: ")
            return
        assert process.stdout.readline().startswith("Serving one, two at http://")
        assert ask(f"{url}/health") == (200, {"status": "ok"})
        body = {"model": "two", "messages": [{"role": "user", "content": "hi"}]}
        assert ask(f"{url}/v1/chat/completions", body)[1]["model"] == "two"
        process.send_signal(signal.SIGTERM)
        assert process.wait(200) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_model_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(hardware, "host_memory_bytes", lambda: 10**9)
    check_memory(config_of("a"))
    config = pyconfig.replace(config_of("a"), "test", decode_slots=4096)
    with pytest.raises(ValueError, match=r"a needs \d+\.\d GB of memory and 1.0 GB are free"):
        check_memory(config)
