"""Speed of CORE on a checkpoint: questions per second, with and without compilation.

    .venv/bin/python benchmarks/core.py configs/base.yml run_name=NAME core_bundle=PATH core_max_per_task=20

With NANOCHAT=/path/to/its/checkout and NANOCHAT_PYTHON=/path/to/a/python with its packages,
nanochat's own evaluation answers the same questions with the same parameters, task by task in
turns, and every answer is compared. Prints wall and CPU seconds by task, a projection to all
questions of the bundle, and a JSON line.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from benchmarks import common
from MaxNano import pyconfig
from MaxNano.distributed import runtime
from MaxNano.evals import core, core_tasks
from MaxNano.evals.core_tasks import CoreTask
from MaxNano.inference import prefix_scoring
from MaxNano.inference.prompts import Scorer
from MaxNano.interop import nanochat
from MaxNano.storage.files import run_directory
from MaxNano.tokenization.bpe import FILE_NAME
from MaxNano.tokenization.tokenizer import Tokenizer, load_tokenizer
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.run_config import config_of_run
from MaxNano.training.setup import set_up


class TaskTiming(NamedTuple):
    """The verdict of each question, a character 0 or 1, and the time in seconds."""

    correct: str
    wall: float
    cpu: float


@contextlib.contextmanager
def start_nanochat(
    config: FrozenConfigDict, params: Any, bos_id: int
) -> Iterator[Callable[[CoreTask], TaskTiming] | None]:
    """Returns a function that lets nanochat answer a task, or None without a nanochat checkout."""
    if not os.environ.get("NANOCHAT"):
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        arrays = nanochat.from_params(jax.tree.map(np.asarray, jax.device_get(params)), config)
        np.savez(Path(folder) / "model.npz", **arrays)
        facts = {
            "model": common.nanochat_model(config),
            "parameters": f"{folder}/model.npz",
            "tokenizer": str(Path(config.tokenizer_path).expanduser() / FILE_NAME),
            "bos_id": bos_id,
            "max_per_task": config.core_max_per_task,
            "shuffle_seed": core_tasks.SHUFFLE_SEED,
        }
        process = subprocess.Popen(
            [
                os.environ.get("NANOCHAT_PYTHON", sys.executable),
                Path(__file__).with_name("nanochat_core.py"),
            ],
            env=os.environ
            | {"PYTHONPATH": f"{os.environ['NANOCHAT']}:{os.environ.get('PYTHONPATH', '')}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        def ask(question: Any) -> Any:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise ValueError("nanochat's evaluation failed; its error stands above")
            return json.loads(answer)

        def run(task: CoreTask) -> TaskTiming:
            return TaskTiming(
                *ask(
                    {
                        "task_type": task.kind,
                        "num_fewshot": task.shots,
                        "continuation_delimiter": task.delimiter,
                        "lines": task.content.decode(),
                    }
                )
            )

        with process:
            print(f"nanochat: {ask(facts)}", flush=True)
            yield run
            process.stdin.close()


def measure(task: CoreTask, tokenizer: Tokenizer, score: Scorer, limit: int) -> TaskTiming:
    """Answers a task with MaxNano, including tokenization and compilation."""
    wall, cpu = time.perf_counter(), time.process_time()
    (result,) = core.evaluate([task], tokenizer, score, max_per_task=limit)
    correct = "".join("01"[answer.correct] for answer in result.answers)
    return TaskTiming(correct, time.perf_counter() - wall, time.process_time() - cpu)


def main(config: FrozenConfigDict) -> None:
    """Measure and compare."""
    config = config_of_run(config, sys.argv[1:])
    runtime.initialize(config)
    setup, tokenizer = set_up(config), load_tokenizer(config)
    tasks = core_tasks.load_bundle(config.core_bundle)
    if os.environ.get("NANOCHAT") and 0 < config.core_max_per_task <= max(
        task.shots for task in tasks
    ):
        raise ValueError(
            "nanochat fails on tasks with no more questions than examples: raise core_max_per_task"
        )
    with jax.set_mesh(setup.mesh):
        with Checkpointer(config, run_directory(config), writer=False) as checkpointer:
            params, _ = checkpointer.restore_params_only(setup.abstract.params, config.step)
        score = prefix_scoring.PrefixScorer(setup, tokenizer.bos_id).bind(params)
        print(
            f"MaxNano: jax {jax.__version__}, {setup.mesh.size} x {setup.mesh.devices.flat[0].device_kind}"
        )
        table, share = [], 0.0
        with start_nanochat(config, params, tokenizer.bos_id) as nanochat:
            for task in tasks:
                first = measure(task, tokenizer, score, config.core_max_per_task)
                # The best of two passes, because the second may compile another shape.
                later = [
                    measure(task, tokenizer, score, config.core_max_per_task) for _ in range(2)
                ]
                again = min(later, key=lambda result: result.cpu)
                questions = len(first.correct)
                row = {
                    "task": task.label,
                    "questions": questions,
                    "all": task.content.count(b"\n"),
                    "wall s": first.wall,
                    "CPU s": first.cpu,
                    "again wall s": again.wall,
                    "again CPU s": again.cpu,
                }
                share += row["all"] / questions * again.wall
                if nanochat:
                    theirs = nanochat(task)
                    row |= {"nanochat wall s": theirs.wall, "nanochat CPU s": theirs.cpu}
                    row["other answers"] = sum(
                        a != b for a, b in zip(first.correct, theirs.correct, strict=True)
                    )
                table.append(row)
                print(json.dumps({"cores": os.cpu_count(), "tasks": table}), flush=True)
    total = {
        "task": "all",
        **{key: sum(row[key] for row in table) for key in table[0] if key != "task"},
    }
    common.show([*table, total], digits=2)
    for kind in ("wall", "CPU"):
        spent, later = total[f"{kind} s"], total[f"again {kind} s"]
        line = f"{kind}: {total['questions'] / spent:.2f} questions/s, {total['questions'] / later:.2f} once compiled"
        if f"nanochat {kind} s" in total:
            theirs = total[f"nanochat {kind} s"]
            line += f"; {theirs / spent:.2f} and {theirs / later:.2f} times nanochat"
        print(line)
    print(
        f"all {total['all']:,} questions: about {(share + total['wall s'] - total['again wall s']) / 60:.0f} minutes"
    )
    print(json.dumps({"cores": os.cpu_count(), "tasks": [*table, total]}))


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
