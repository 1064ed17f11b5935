"""nanochat's side of core.py, which starts it in a Python with nanochat's packages.

Imports nothing of MaxNano. Builds nanochat's model from a JSON line, then answers each further one,
a task, with the correctness of each question, wall and CPU seconds.
"""

import json
import random
import sys
import time

import numpy as np
import torch
from nanochat import core_eval
from nanochat.gpt import GPT, GPTConfig
from nanochat_input_pipeline import load_tokenizer


def main():
    """Serve tasks until standard input ends."""
    facts = json.loads(sys.stdin.readline())
    tokenizer = load_tokenizer(facts["tokenizer"])
    assert tokenizer.get_bos_token_id() == facts["bos_id"]
    model = GPT(GPTConfig(**facts["model"]))
    model.init_weights()
    with np.load(facts["parameters"]) as arrays:
        model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays})
    model.float().eval()
    device = torch.device("cpu")
    print(json.dumps(f"torch {torch.__version__}, {torch.get_num_threads()} threads"), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        data = [json.loads(row) for row in task.pop("lines").rstrip("\n").split("\n")]
        random.Random(facts["shuffle_seed"]).shuffle(data)
        data = data[: facts["max_per_task"] or None]
        wall, cpu = time.perf_counter(), time.process_time()
        correct = [
            core_eval.evaluate_example(i, model, tokenizer, data, device, task)
            for i in range(len(data))
        ]
        spent = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps(["".join("01"[bool(verdict)] for verdict in correct), *spent]), flush=True)


if __name__ == "__main__":
    main()
