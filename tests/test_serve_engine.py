"""The server with the real engine and a small random model: replies, load, lm-eval."""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_engine import byte_tokenizer
from serving import Server, wait_until

from MaxNano import pyconfig
from MaxNano.inference.dialogue import ReplyDecoder, prompt_ids
from MaxNano.inference.engine import Engine
from MaxNano.inference.requests import Request
from MaxNano.models.setup import set_up_model

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = byte_tokenizer()
BOS = TOKENIZER.bos_id
TINY = (
    "run_name=tiny",
    "vocab_size=265",
    "max_target_length=64",
    "num_decoder_layers=2",
    "emb_dim=32",
    "head_dim=16",
    "num_query_heads=2",
    "steps=20",
    "short_window_multiple=8",
    "global_batch_tokens=256",
    "num_cpu_devices=1",
    "top_k=0",
    "stream_interval=4",
)


def make(slots, *overrides, max_length=128):
    """(config, engine) of a small model with random weights."""
    config = pyconfig.initialize(["configs/base.yml", *TINY, *overrides])
    setup = set_up_model(config, jax.devices()[:1])
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda leaf: draw(0, 0.4, leaf.shape).astype(np.float32), setup.params)
    params["resid_lambdas"] += 1
    return config, Engine(setup, params, TOKENIZER, slots=slots, max_length=max_length)


def text_of(tokens):
    decoder = ReplyDecoder(TOKENIZER)
    return "".join(part.text for part in [*decoder.feed(tokens), *decoder.finish()])


def test_replies_are_the_engines():
    config, engine = make(2)
    messages = [{"role": "user", "content": "hello"}]
    chat = tuple(prompt_ids(TOKENIZER, messages))
    special = TOKENIZER.special
    stops = frozenset({special.assistant_end, special.bos})
    scored = (BOS, *b"some text that is scored")
    requests = [
        Request(chat, 24, temperature=0, stop_ids=stops),
        Request(chat, 24, samples=2, temperature=1.0, seed=7, stop_ids=stops),
        Request(scored, 1, temperature=0, logprobs=1, prompt_logprobs=True),
    ]
    [greedy], drawn, [scores] = engine.generate(requests)
    with Server(engine, config=config) as server:
        create = server.client.chat.completions.create
        asked = {"model": "tiny", "messages": messages, "max_tokens": 24}
        whole = create(**asked, temperature=0)
        assert whole.choices[0].message.content == text_of(greedy.tokens)
        assert whole.choices[0].finish_reason == greedy.finish
        assert whole.usage.completion_tokens == len(greedy.tokens)
        chunks = [chunk.choices[0] for chunk in create(**asked, temperature=0, stream=True)]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == text_of(greedy.tokens)
        both = create(**asked, temperature=1, seed=7, n=2)
        assert [choice.message.content for choice in both.choices] == [
            text_of(each.tokens) for each in drawn
        ]
        [choice] = server.client.completions.create(
            model="tiny", prompt=list(scored), temperature=0, max_tokens=1, logprobs=1, echo=True
        ).choices
        reported = choice.logprobs
        given = [*scores.prompt_logprobs, *scores.logprobs]
        assert reported.token_logprobs[0] is None
        np.testing.assert_allclose(
            reported.token_logprobs[1:], [score.logprob for score in given], rtol=1e-6
        )
        best = [max(top.values()) for top in reported.top_logprobs[1:]]
        np.testing.assert_allclose(best, [score.top[0][1] for score in given], rtol=1e-6)
        wait_until(lambda: server.service.pending == 0 and engine.is_idle)


@pytest.mark.slow
def test_64_streams_are_each_as_alone():
    """64 streams of 50 tokens over 16 slots: each equals the greedy completion alone."""
    config, engine = make(16)
    prompts = [f"{'word ' * (i % 9)}number {i}" for i in range(64)]
    alone = [
        engine.generate(
            [Request((BOS, *prompt.encode()), 50, temperature=0, stop_ids=frozenset({BOS}))]
        )[0][0]
        for prompt in prompts
    ]
    assert sum(len(completion.tokens) == 50 for completion in alone) > 50

    def ask(prompt):
        chunks = server.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=50, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    with Server(engine, config=config) as server, ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, prompts))
    assert together == [text_of(completion.tokens) for completion in alone]


SERVING = """
import test_serve_engine
from MaxNano.serving.app import make_app
from MaxNano.serving.http_server import bind, serve

config, engine = test_serve_engine.make(16)
engine.compile()
serve(make_app(config, engine), bind("127.0.0.1", 0), drain_seconds=30)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_2000_requests_of_which_a_fifth_leave_keep_the_memory_flat():
    import openai

    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SERVING], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        port = int(re.search(r":(\d+) ", process.stdout.readline())[1])
        url = f"http://127.0.0.1:{port}/v1"
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
        draw = random.Random(0)

        def resident():
            status = Path(f"/proc/{process.pid}/status").read_text()
            return int(re.search(r"VmRSS:\s+(\d+)", status)[1])

        def ask(leaves):
            body = json.dumps(
                {
                    "messages": [{"role": "user", "content": "tell me"}],
                    "max_tokens": 50,
                    "stream": leaves,
                }
            ).encode()
            if not leaves:
                return client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": "tell me"}], max_tokens=50
                ).usage.completion_tokens
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
                return connection.recv(20)

        with ThreadPoolExecutor(32) as pool:
            warm = list(pool.map(ask, [draw.random() < 0.2 for _ in range(400)]))
            before = resident()
            done = list(pool.map(ask, [draw.random() < 0.2 for _ in range(2000)]))
        after = resident()
        print(f"resident {before} kB after {len(warm)} requests, {after} kB after {len(done)} more")
        assert after < 1.05 * before
        client.models.list()
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


TASK = """
task: parity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
def test_lm_eval_reads_the_engines_scores(tmp_path):
    """lm-eval's local-completions with the server's tokenizer reports the engine's scores."""
    program = shutil.which("lm_eval")
    if not program:
        pytest.skip("lm_eval is not installed (pip install lm_eval[api])")
    rows = [
        {"question": f"Is {n} é even?", "choices": ["yes", "no, never"], "answer": n % 2}
        for n in range(12)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "parity.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    config, engine = make(4)
    expected = []
    for row in rows:
        for choice in row["choices"]:
            whole = (BOS, *f"{row['question']} {choice}".encode())
            [[scored]] = engine.generate([Request(whole, 0, logprobs=1, prompt_logprobs=True)])
            own = scored.prompt_logprobs[-len(choice) - 1 :]
            is_greedy = all(score.logprob == score.top[0][1] for score in own)
            expected.append((sum(score.logprob for score in own), is_greedy))
    with Server(engine, config=config) as server:
        arguments = f"model=tiny,base_url={server.url}/completions,num_concurrent=4,max_length=127"
        ran = subprocess.run(
            [
                program,
                "--model",
                "local-completions",
                "--model_args",
                arguments,
                "--tasks",
                "parity",
                "--include_path",
                tmp_path,
                "--output_path",
                tmp_path / "out",
                "--log_samples",
            ],
            env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert ran.returncode == 0, ran.stderr[-3000:]
    [found] = tmp_path.glob("out/**/samples_parity_*.jsonl")
    samples = sorted(
        map(json.loads, found.read_text().splitlines()), key=lambda sample: sample["doc_id"]
    )
    told = [answer for sample in samples for [answer] in sample["resps"]]
    np.testing.assert_allclose(
        [float(score) for score, _ in told], [score for score, _ in expected], rtol=1e-5
    )
    assert [str(is_greedy) for _, is_greedy in told] == [
        str(is_greedy) for _, is_greedy in expected
    ]
