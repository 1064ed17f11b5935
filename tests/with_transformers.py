"""What `transformers` makes of exported folders: run by tests/test_huggingface.py, perhaps by
another Python.

    python tests/with_transformers.py FOLDER ...

Beside each FOLDER lies FOLDER.json with `texts`, `conversation`, `ids` (rows of equal length) and
`new_tokens`; the answers go to FOLDER.npz and FOLDER.answers.json, and the model, saved anew in
small shards, to FOLDER.again.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

torch.set_num_threads(1)  # the models are tiny


def refusals(model, rows) -> list[str]:
    """What the model says to caches that it does not know, and to one that did not arrive."""
    length = rows.shape[1]
    static = StaticCache(config=model.config, max_cache_len=length)
    said = []
    for arguments in (
        {"memory": DynamicCache(config=model.config)},
        {"cache": static},
        {"past_key_values": static},
        {"attention_mask": torch.ones(len(rows), length)},
    ):
        try:
            model(rows[:, :1], **arguments)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def answer(folder: Path) -> None:
    """Answer the questions about one folder."""
    asked = json.loads(Path(f"{folder}.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    rows = torch.tensor(asked["ids"])
    length = rows.shape[1]
    greedy = {"max_new_tokens": asked["new_tokens"], "do_sample": False, "eos_token_id": None}
    found = {}
    with torch.no_grad():
        output = model(rows, labels=rows)
        found["logits"], found["loss"] = output.logits, output.loss
        # By one token, then two, then the rest of the row at a time, over the cache.
        name = "cache" if "cache" in output else "past_key_values"  # the former since 5.24
        parts, cache = [], None
        for start, end in ((0, 1), (1, 3), (3, length)):
            step = model(rows[:, start:end], **{name: cache}, use_cache=True)
            parts.append(step.logits)
            cache = step[name]
        found["cached"] = torch.cat(parts, dim=1)
        # The first row shortened and padded before.
        short = torch.cat([torch.zeros(1, 5, dtype=torch.long), rows[:1, : length - 5]], dim=1)
        mask = torch.ones_like(rows)
        mask[0, :5] = 0
        padded = torch.cat([short, rows[1:]])
        found["padded"] = model(padded, attention_mask=mask).logits
        found["greedy"] = model.generate(
            rows[:, :8], attention_mask=mask[1:, :8].repeat(len(rows), 1), **greedy
        )
        found["uncached"] = model.generate(
            rows[:, :8], attention_mask=torch.ones_like(rows[:, :8]), use_cache=False, **greedy
        )
        found["padded_greedy"] = model.generate(
            padded[:, :13], attention_mask=mask[:, :13], **greedy
        )
        beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        found["beams"] = model.generate(rows[:1, :8], **beams)
        found["uncached_beams"] = model.generate(rows[:1, :8], use_cache=False, **beams)
    model.save_pretrained(f"{folder}.again", max_shard_size="200KB")
    tokenizer.save_pretrained(f"{folder}.again")
    half = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.bfloat16
    )
    answers = {
        "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked["texts"]],
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"][1:]) for text in asked["texts"]],
        "first": tokenizer("x")["input_ids"][0],
        "rendered": tokenizer.apply_chat_template(asked["conversation"], return_dict=False),
        "prompt": tokenizer.apply_chat_template(
            asked["conversation"][:-1], add_generation_prompt=True, return_dict=False
        ),
        "windows": model.config.windows,
        "refusals": refusals(model, rows),
        "eos": tokenizer.eos_token,
        "half": {name: str(p.dtype) for name, p in half.named_parameters() if p.dim() == 1},
        "half_loss": float(half(rows, labels=rows).loss),
    }
    np.savez(f"{folder}.npz", **{name: value.numpy() for name, value in found.items()})
    Path(f"{folder}.answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        answer(Path(name))
