"""An OpenAI-compatible server for one model, with a chat page.

    python MaxNano/serve.py configs/base.yml model=d24 stage=sft    # http://127.0.0.1:8000

Endpoints: /v1/models, /v1/completions, /v1/chat/completions, /v1/responses, /health, /metrics
(Prometheus), the page at /, and vLLM's /tokenize, /detokenize and /tokenizer_info, which lm-eval
uses. docs/clients.md describes them. Requests share
the engine's batch (continuous batching); up to serve_queue more wait, further ones get status 429.

Without an API key in the environment, only this machine has access. Prompts and replies are neither
logged nor stored. After SIGTERM, running replies end before the server exits.
"""

import importlib.util
import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # as a script, MaxNano/ is first on sys.path instead of the repository
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # before the import of JAX
    if not all(map(importlib.util.find_spec, ("starlette", "uvicorn", "prometheus_client"))):
        print("error: the server needs more packages: EXTRAS=serve bash setup.sh", file=sys.stderr)
        sys.exit(2)

import logging

from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.distributed import runtime
from MaxNano.serving.access import read_api_key
from MaxNano.serving.app import make_app
from MaxNano.serving.http_server import bind, serve
from MaxNano.training.loading import load_engine


def log_to_stderr() -> None:
    """Print the server's log lines, independent of handlers that libraries install."""
    log = logging.getLogger("maxnano.serve")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def main(config: FrozenConfigDict) -> None:
    """Load the run's checkpoint and serve it."""
    log_to_stderr()
    api_key = read_api_key(config)
    bound = bind(config.serve_host, config.serve_port)  # fails before the model is loaded
    runtime.initialize(config)
    engine = load_engine(config, streams=True)
    print(f"Compiling for {engine.slots} sequences of {engine.max_length} tokens", flush=True)
    engine.compile()
    serve(make_app(config, engine, api_key), bound, config.serve_drain_seconds)


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
