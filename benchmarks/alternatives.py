"""Estimates how design alternatives of the train step change cycles and memory of a TPU.

    .venv/bin/python benchmarks/alternatives.py configs/base.yml model=d24 emb_dim=1536 \
        num_decoder_layers=4 window_pattern=SL compile_report=alternatives.jsonl

Each alternative is a set of words that a user can add to this command. Four layers with every
second window long are a scan over two groups with all features of d24; omit these words for the
whole model. Nothing is run. Rows are kept in compile_report as JSON lines (null: alternatives.jsonl
in the run's folder) and are not compiled again. Prints a table and a JSON line.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()

import json

import jax
from ml_collections import FrozenConfigDict

from benchmarks import common
from MaxNano import pyconfig
from MaxNano.compile import costs
from MaxNano.scaling import largest_divisor
from MaxNano.storage.files import run_directory

BASE = "as configured"
ALTERNATIVES = {  # the most important first: a table may stay unfinished
    BASE: "",
    "table gradients scattered": "embedding_gradient=scatter",
    "table gradients as a product": "embedding_gradient=one_hot",
    "splash": "attention=splash",
    "recompute everything": "remat_policy=full",
    "recompute nothing": "remat_policy=none",
    "keep matrix products": "remat_policy=minimal",
    "XLA's products": "layer_products=xla",
    "the same, keep attention and MLP": "layer_products=xla remat_policy=names remat_names=[attention_out,mlp_hidden]",
    "micro-batches of 8 rows": "per_device_batch_size=8",
    "larger VMEM limit": "xla_flags=[vmem]",
    "every layer recomputes": "remat_policy=names",
    "flash, tiles of 128": "flash_block=128",
    "layers in a loop": "scan_layers=true",
    "tables kept in float32": "embedding_dtype=float32",
    "whole logits": "vocab_chunk_size=0",
    "logits in chunks": "vocab_chunk_size=8192",
    "splash, split backward": "attention=splash splash_fused_backward=false",
    "collectives on SparseCores": "xla_flags=[vmem,sparse_core]",
    "flash, tiles of 512": "flash_block=512",
    "splash, blocks of 512": "attention=splash splash_long_forward=[512,512,512] splash_long_backward=[512,512,512]",
    "replicated weights": "logical_axis_rules=[[activation_batch,data,fsdp]]",
}
# Per device and micro-batch if per_device_batch_size is null, the same for all alternatives.
ROWS = 32
COLUMNS = (
    "alternative",
    "more",
    "all",
    "calibrated",
    *costs.CLASSES,
    "GiB",
    "compiled s",
    "failure",
)


def configs(words: list[str]) -> dict[str, FrozenConfigDict]:
    """The config of each alternative: the words of the command line, then those of the alternative."""
    base = pyconfig.initialize(words)
    if base.per_device_batch_size is None:
        chip_rows = base.global_batch_tokens // base.max_target_length // common.chips_of(base)
        words = [*words, f"per_device_batch_size={largest_divisor(max(chip_rows, 1), ROWS)}"]
    return {
        name: pyconfig.initialize([*words, *changes.split()])
        for name, changes in ALTERNATIVES.items()
    }


def main(config: FrozenConfigDict) -> None:
    """Compile the missing rows; print all."""
    jax.config.update("jax_enable_compilation_cache", False)
    kept = common.Kept(config.compile_report or run_directory(config) / "alternatives.jsonl")
    rows = []
    for name, alternative in configs(sys.argv[1:]).items():
        task = {
            key: alternative[key]
            for key in pyconfig.keys_of(alternative)
            if key not in ("compile_report", "run_name")
        }
        row = kept.find(task) or kept.add(
            task, {"alternative": name, **common.compile_step(alternative)}
        )
        rows.append({**row, "alternative": name})
        if "all" in row and "all" in rows[0]:
            rows[-1]["more"] = row["all"] - rows[0]["all"]
        print(
            f"{name}: {row.get('failure') or format(row['all'], ',.1f')}",
            file=sys.stderr,
            flush=True,
        )
    print(
        f"ESTIMATED for {config.compile_topology}, not measured: {config.num_decoder_layers} layers of "
        f"{config.emb_dim}, {config.global_batch_tokens:,} tokens per step; M cycles per chip"
    )
    common.show(rows, COLUMNS)
    print(json.dumps({"base": sys.argv[1:], "rows": rows}))


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
