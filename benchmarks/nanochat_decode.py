"""nanochat's side of decode.py, which starts it in a Python with nanochat's packages.

Imports nothing of MaxNano. Builds nanochat's model around the weights of a JSON line, on the GPU
where there is one, then answers each further line {prompt, samples, max_tokens} with a JSON list:
the seconds of a greedy answer, and the tokens of its first row.
"""

import json
import sys
import time

import numpy as np
import torch
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig


class NoSpecials:
    """The tokenizer that nanochat's engine requires; no token that the model generates is special."""

    def encode_special(self, name):
        return -1

    def get_bos_token_id(self):
        return -1


def main():
    """Serve answers until standard input ends."""
    task = json.loads(sys.stdin.readline())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = GPT(GPTConfig(**task["model"]))
    model.to_empty(device=device)
    model.init_weights()
    with np.load(task["weights"]) as weights:
        model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})
    engine = Engine(model.eval(), NoSpecials())
    print(json.dumps(f"torch {torch.__version__} on {device}"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.perf_counter()
        columns = [
            column
            for column, _ in engine.generate(
                request["prompt"],
                num_samples=request["samples"],
                max_tokens=request["max_tokens"],
                temperature=0.0,
            )
        ]
        seconds = time.perf_counter() - begin
        print(json.dumps([seconds, [column[0] for column in columns]]), flush=True)


if __name__ == "__main__":
    main()
