"""The server with real clients of other projects: run by tests/run_clients.sh, which installs them.

tests/test_serve.py and tests/test_serve_clients.py test the same without them, in every run.
"""

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import test_serve_engine
from serving import Server

CLIENTS = Path(os.environ.get("CLIENTS", "/nonexistent"))
PYTHON = CLIENTS / "python/bin/python"
TESTS = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="needs other projects' clients: bash tests/run_clients.sh"
)


@pytest.fixture(scope="module")
def server():
    """A model with random weights and a context of 512 tokens."""
    overrides = ["temperature=1.0", "seed=0"]
    config, engine = test_serve_engine.make(4, *overrides, max_length=512)
    with Server(engine, config=config) as running:
        yield running


def run(command, folder, **environment):
    """Run a client; it must succeed."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        list(map(str, command)),
        env=clean | {"HOME": str(folder), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return ran.stdout


@pytest.mark.parametrize("client", ["openai", "langchain", "litellm"])
def test_clients_for_python(server, tmp_path, client):
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}
    output = run([PYTHON, TESTS / "with_clients.py", client, server.url], tmp_path, **offline)
    assert json.loads(output.splitlines()[-1]) == {"client": client, "passed": True}


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_openais_client_for_node(server, tmp_path):
    output = run(["node", TESTS / "with_clients.mjs", CLIENTS / "node", server.url], tmp_path)
    assert json.loads(output)["passed"]


@contextlib.contextmanager
def website(folder):
    """The address of a site of its own origin with the files of a folder."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        try:
            yield f"http://localhost:{site.server_port}"
        finally:
            site.shutdown()
            thread.join()


@pytest.mark.skipif(not (CLIENTS / "node").exists(), reason="needs npm")
@pytest.mark.parametrize("rule", ["serve_cors_origins=[{}]", "serve_cors_origin_regex={}"])
def test_openais_client_in_a_page_of_another_site(rule):
    """The npm package in Chromium: preflights, streams, errors; other sites have no access."""
    import browser  # needs playwright

    if browser.CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    script, key = (TESTS / "with_browser.js").read_text(), "a-key-of-sixteen-or-more"
    with website(CLIENTS / "node") as origin, website(CLIENTS / "node") as other:
        pattern = origin if "origins" in rule else r"http://localhost:" + origin.split(":")[-1]
        config, engine = test_serve_engine.make(4, rule.format(pattern), max_length=512)
        with Server(engine, config=config, key=key) as server, browser.launched() as chromium:
            page = chromium.new_page()
            page.goto(f"{origin}/node_modules/openai/package.json")
            results = page.evaluate(script, [server.url, key])
            page.goto(f"{other}/node_modules/openai/package.json")
            with pytest.raises(
                browser.playwright.Error, match="APIConnectionError|Connection error"
            ):
                page.evaluate(script, [server.url, key])
    assert results["origin"] == origin != server.url.removesuffix("/v1")
    assert 0 < results["tokens"] <= 8 and results["chunks"] > 1
    cities = [call["city"] for call in results["calls"]]
    assert cities and set(cities) <= {"Ulm", "Rome"}
    assert results["items"]
    assert {kind for kind, _ in results["items"]} == {"function_call"}
    assert {arguments["city"] for _, arguments in results["items"]} <= {"Ulm", "Rome"}
    assert results["models"] == ["tiny"]
    assert results["long"] == "400 context_length_exceeded"
    assert results["stranger"] == "401 invalid_api_key"


TASK = """
task: echo
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def test_lm_eval_generates_by_the_chat(server, tmp_path):
    rows = [{"question": f"Say {n}", "answer": f"{n}"} for n in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "echo.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    model = f"model=tiny,base_url={server.url}/chat/completions,num_concurrent=2"
    command = [CLIENTS / "python/bin/lm_eval", "--model", "local-chat-completions"]
    command += ["--model_args", model, "--tasks", "echo", "--include_path", tmp_path]
    command += ["--apply_chat_template", "--output_path", tmp_path / "out", "--log_samples"]
    run(command, tmp_path, HF_HUB_OFFLINE="1")
    [found] = tmp_path.glob("out/**/samples_echo_*.jsonl")
    samples = list(map(json.loads, found.read_text().splitlines()))
    asked = {sample["doc"]["question"]: sample["resps"][0][0] for sample in samples}
    for question, said in asked.items():
        _, reply = server.chat(question, max_tokens=8, temperature=0, stop=["\n"])
        assert said == reply["choices"][0]["message"]["content"]


def test_lm_eval_reads_the_engines_scores(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{CLIENTS / 'python/bin'}{os.pathsep}{os.environ['PATH']}")
    test_serve_engine.test_lm_eval_reads_the_engines_scores(tmp_path)
