"""An OpenAI-compatible server for one model or several, with a chat page.

    .venv/bin/python MaxNano/serve.py configs/base.yml run_name=NAME           # http://127.0.0.1:8000
    .venv/bin/python MaxNano/serve.py configs/base.yml "serve_runs=[A, B]"     # a request's `model` chooses

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
        hint = "EXTRAS=serve bash setup.sh, or pip install '.[serve]' in a checkout"
        print(f"error: the server needs more packages: {hint}", file=sys.stderr)
        sys.exit(2)

import logging
from collections.abc import Sequence

from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.distributed import runtime
from MaxNano.inference.memory import check_memory
from MaxNano.serving.access import read_api_key
from MaxNano.serving.app import make_models_app
from MaxNano.serving.http_server import bind, serve
from MaxNano.serving.models import Models
from MaxNano.training.run_config import config_of_run

FIRST_PROGRAMS = 2  # decode, and the prefill of short prompts: compiled before a model is ready


def log_to_stderr() -> None:
    """Print the server's log lines, independent of handlers that libraries install."""
    log = logging.getLogger("maxnano.serve")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def configs_of_runs(config: FrozenConfigDict, argv: Sequence[str]) -> list[FrozenConfigDict]:
    """The configs of the runs to serve, the first one of serve_runs or run_name first."""
    names = dict.fromkeys(config.serve_runs or [config.run_name])
    return [
        config_of_run(
            pyconfig.replace(config, pyconfig.COMMAND_LINE, run_name=name),
            [*argv, f"run_name={name}"],
        )
        for name in names
    ]


def load(models: Models, configs: Sequence[FrozenConfigDict]) -> None:
    """Load the models one by one. The rest of their programs is compiled while they are idle.

    Raises ValueError for a checkpoint that cannot be loaded or does not fit into the memory.
    """
    from MaxNano.training.loading import load_engine  # takes seconds to import

    models.set_progress("starting JAX")
    runtime.initialize(configs[0])
    for config in configs:
        models.set_progress(f"reading the checkpoint of {config.run_name}")
        check_memory(config)
        engine = load_engine(config, streams=True)
        models.set_progress(f"compiling the programs of {config.run_name}")
        programs = engine.compile_programs()
        for _ in range(FIRST_PROGRAMS):
            next(programs, None)
        models.add(config, engine, programs)


def main(config: FrozenConfigDict, argv: Sequence[str]) -> None:
    """Serve the runs; the server answers while it loads them."""
    log_to_stderr()
    api_key = read_api_key(config)
    configs = configs_of_runs(config, argv)
    bound = bind(config.serve_host, config.serve_port)
    models = Models(config, [each.run_name for each in configs], api_key)
    app = make_models_app(models)
    serve(app, bound, config.serve_drain_seconds, lambda: load(models, configs))


if __name__ == "__main__":
    sys.exit(pyconfig.launch(lambda config: main(config, sys.argv[1:])))
