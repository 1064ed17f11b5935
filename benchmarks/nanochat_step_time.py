"""nanochat's side of step_time.py: started by it, in a Python that has nanochat's packages.

Imports nothing of MaxNano. Builds and compiles nanochat's model and optimizer from a JSON line, then answers each
further line, a number of steps, with a JSON list of the seconds that each of them took.
"""

import json
import sys
import time

import torch
from nanochat.gpt import GPT, GPTConfig


def main():
    """Serve steps until standard input ends."""
    task = json.loads(sys.stdin.readline())
    torch.manual_seed(0)
    model = GPT(GPTConfig(**task["model"]))
    model.init_weights()
    optimizer = model.setup_optimizer()
    compiled = torch.compile(model, dynamic=False)
    shape = (task["rows"], task["model"]["sequence_len"] + 1)
    tokens = torch.randint(0, task["model"]["vocab_size"], shape)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step():
        begin = time.perf_counter()
        compiled(inputs, targets).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return time.perf_counter() - begin

    step()  # compiles
    print(json.dumps(f"torch {torch.__version__}"), flush=True)
    for line in sys.stdin:
        print(json.dumps([step() for _ in range(int(line))]), flush=True)


if __name__ == "__main__":
    main()
