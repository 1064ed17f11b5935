"""Records nanochat_eras.json: the logits of nanochat's own code at seven points of its history, and
those of transformers' NanoChatForCausalLM.

    python tests/golden/record_nanochat_eras.py CLONE_OF_KARPATHY_NANOCHAT

Needs git, numpy, torch (2.13 was used) and transformers (5.24 was used); runs in float32 on a CPU.
The weights are a formula, so that the file holds only names and shapes.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np

COMMITS = {
    "2025-10-20": "2e9669e",
    "2026-01-08": "f5a0ea4",
    "2026-01-16": "b62a5bc",
    "2026-02-05": "e527521",
    "2026-03-04": "1076f97",
    "2026-03-09": "6ed7d1d",
    "head": "92d63d4",
}
# Short windows of a half, a third and a quarter of 1024 differ, and the text is longer than all.
MODEL = {
    "sequence_len": 1024,
    "vocab_size": 100,
    "n_layer": 4,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 64,
}
WINDOWS = "SSLL"
TOKENS, STRIDE = 640, 49
FOLDER = Path(__file__).resolve().parent


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Numbers of about the size of trained weights, by a formula from names and shapes."""
    arrays = {}
    for index, name in enumerate(sorted(shapes)):
        x = np.arange(int(np.prod(shapes[name])), dtype=np.uint64) + np.uint64(1)
        x = (x * np.uint64(2654435761) + np.uint64(97 * index)) % np.uint64(2**32)
        for shift, factor in ((16, 2246822519), (13, 3266489917)):
            x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) % np.uint64(2**32)
        values = 2 * (x ^ (x >> np.uint64(16))).astype(np.float64) / 2**32 - 1
        base, scale = (1.0, 0.2) if name.endswith("resid_lambdas") else (0.0, 0.3)
        if "lm_head" in name:
            scale = 0.8  # logits that the cap bends
        arrays[name] = (base + scale * values).reshape(shapes[name]).astype(np.float32)
    return arrays


def tokens() -> np.ndarray:
    """The token ids (1, TOKENS)."""
    t = np.arange(TOKENS)[None]
    return (7 * t + t**2 // 5) % MODEL["vocab_size"]


def answer(model) -> dict:
    """The names and shapes of a model's tensors, and its logits with the formula's weights."""
    import torch

    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {name: torch.from_numpy(array) for name, array in weights(shapes).items()}
    model.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(tokens()))
    logits = getattr(logits, "logits", logits)[0, ::STRIDE, : MODEL["vocab_size"]]
    return {"shapes": shapes, "logits": np.round(logits.float().numpy(), 6).tolist()}


def record_nanochat() -> dict:
    """Of the nanochat in the Python path."""
    from dataclasses import asdict, fields

    from nanochat.gpt import GPT, GPTConfig

    names = {field.name for field in fields(GPTConfig)}
    windows = {"window_pattern": WINDOWS} if "window_pattern" in names else {}
    config = GPTConfig(**MODEL, **windows)
    model = GPT(config)
    model.init_weights()  # the rotary tables
    return {"model_config": asdict(config), **answer(model)}


def record_transformers() -> dict:
    """Of the installed transformers."""
    from transformers import NanoChatConfig, NanoChatForCausalLM, __version__

    config = NanoChatConfig(
        vocab_size=MODEL["vocab_size"],
        hidden_size=MODEL["n_embd"],
        intermediate_size=4 * MODEL["n_embd"],
        num_hidden_layers=MODEL["n_layer"],
        num_attention_heads=MODEL["n_head"],
        num_key_value_heads=MODEL["n_kv_head"],
        max_position_embeddings=MODEL["sequence_len"],
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        final_logit_softcapping=12.0,
        architectures=["NanoChatForCausalLM"],
    )
    content = json.loads(config.to_json_string())
    made = answer(NanoChatForCausalLM(config))
    return {"transformers": __version__, "config": content, **made}


def run(kind: str, path: str = "") -> dict:
    """What this file prints for `kind`, in a process whose Python path begins with `path`."""
    environment = {**os.environ, "PYTHONPATH": path, "NANOCHAT_DTYPE": "float32"}
    command = [sys.executable, __file__, f"--{kind}"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(clone: str) -> None:
    """Writes nanochat_eras.json."""
    recorded = {}
    for era, commit in COMMITS.items():
        with tempfile.TemporaryDirectory() as folder:
            command = ["git", "-C", clone, "archive", commit, "nanochat"]
            archive = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
            with tarfile.open(fileobj=BytesIO(archive)) as files:
                files.extractall(folder, filter="data")
            recorded[era] = {"commit": commit, **run("nanochat", folder)}
    recorded["transformers"] = run("transformers")
    text = json.dumps(recorded, separators=(",", ":")).replace('},"', '},\n"')
    (FOLDER / "nanochat_eras.json").write_text(text + "\n")


if __name__ == "__main__":
    kinds = {"--nanochat": record_nanochat, "--transformers": record_transformers}
    if sys.argv[1] in kinds:
        print(json.dumps(kinds[sys.argv[1]]()))
    else:
        main(sys.argv[1])
