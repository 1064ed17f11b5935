"""Downloads data sets, the CORE bundle and the chat tasks' data before a run.

    .venv/bin/python MaxNano/data/download.py configs/base.yml dataset_type=hf \\
        dataset_name=karpathy/climbmix-400b-shuffle download_shards=8
    .venv/bin/python MaxNano/data/download.py configs/base.yml download=[core,chat]

Interrupted at any time, the same command resumes. hub.py does the work.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:
        # Not MaxNano/data/, which hides modules.
        sys.path[0] = str(Path(__file__).resolve().parents[2])
    import MaxNano  # noqa: F401  # explains a missing package

import os
import signal
from typing import Any

from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.data import hub, sources

# nanochat's chat tasks: repository, subset, splits.
CHAT_DATA = (
    ("allenai/ai2_arc", "ARC-Easy", ("train", "test")),
    ("allenai/ai2_arc", "ARC-Challenge", ("train", "test")),
    ("cais/mmlu", "all", ("auxiliary_train", "test")),
    ("openai/gsm8k", "main", ("train", "test")),
    ("openai/openai_humaneval", "openai_humaneval", ("test",)),
    ("HuggingFaceTB/smol-smoltalk", "default", ("train", "test")),
)


def hub_datasets(config: Any) -> list[Any]:
    """The configs of all parts of the data set that are on the hub; ValueError if none is."""
    parts = [config]
    if config.dataset_type == "mixture":
        parts = [part for _, part in sources.mixture_parts(config)]
    parts = [part for part in parts if part.dataset_type == "hf"]
    if not parts:
        raise ValueError(
            f"dataset_type={config.dataset_type} has nothing to download; set dataset_type=hf and "
            "dataset_name=OWNER/NAME, such as karpathy/climbmix-400b-shuffle"
        )
    return parts


def main(config: FrozenConfigDict) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        if "dataset" in config.download:
            for part in hub_datasets(config):
                print(f"Downloaded {hub.fetch_dataset(part)}", flush=True)
        if "core" in config.download:
            print(f"Downloaded {hub.fetch_core(config)}", flush=True)
        if "chat" in config.download:
            for repository, subset, splits in CHAT_DATA:
                for split in splits:
                    folder = hub.fetch_split(config, repository, subset, split)
                    print(f"Downloaded {folder}", flush=True)
    except KeyboardInterrupt:
        print("Interrupted; the same command resumes", file=sys.stderr, flush=True)
        os._exit(os.EX_TEMPFAIL)  # does not wait for the threads that still receive a chunk
    return 0


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
