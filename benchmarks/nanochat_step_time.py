"""nanochat's side of step_time.py, which starts it in a Python with nanochat's packages.

Imports nothing of MaxNano. Builds and compiles nanochat's model and optimizer from a JSON line, on
the GPU where there is one, then answers each further line, a number of steps, with a JSON list of
the seconds that each of them took. A step is `micro_batches` forward and backward passes of `rows`
rows and one update, as in nanochat's base_train.py.
"""

import json
import sys
import time

import torch
from nanochat import flash_attention
from nanochat.gpt import GPT, GPTConfig


def main():
    """Serve steps until standard input ends."""
    task = json.loads(sys.stdin.readline())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(GPTConfig(**task["model"]))
    model.to_empty(device=device)
    model.init_weights()
    optimizer = model.setup_optimizer()
    compiled = torch.compile(model, dynamic=False)
    micro_batches = task.get("micro_batches", 1)
    shape = (task["rows"], task["model"]["sequence_len"] + 1)
    tokens = torch.randint(0, task["model"]["vocab_size"], shape, device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def synchronize():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def step():
        synchronize()
        begin = time.perf_counter()
        for _ in range(micro_batches):
            (compiled(inputs, targets) / micro_batches).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        synchronize()
        return time.perf_counter() - begin

    step()  # compiles
    attention = "FlashAttention 3" if flash_attention.USE_FA3 else "scaled_dot_product_attention"
    print(json.dumps(f"torch {torch.__version__} on {device}, {attention}"), flush=True)
    for line in sys.stdin:
        print(json.dumps([step() for _ in range(int(line))]), flush=True)
        if device.type == "cuda":
            print(
                f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most",
                file=sys.stderr,
                flush=True,
            )


if __name__ == "__main__":
    main()
