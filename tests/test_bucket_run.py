"""A run that lives in a bucket, by the commands of README: killed and stopped in the middle of
uploads, then used.
"""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import object_store
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ports import free_port

ROOT = Path(__file__).parents[1]
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards mix strange and bright potions".split()
STEPS = 8


class Place:
    """A bucket with documents, and the commands that work on it."""

    def __init__(self, store):
        self.store = store
        for shard in range(3):
            texts = [
                " ".join(WORDS[(i * j + shard) % len(WORDS)] for j in range(3 + i % 60))
                for i in range(300)
            ]
            content = io.BytesIO()
            pq.write_table(pa.table({"text": texts}), content, row_group_size=50)
            store.put(f"text/{shard}.parquet", content.getvalue())

    def start(self, program, run_name, *more, before=(), without=()):
        words = [
            sys.executable,
            str(ROOT / program),
            *before,
            str(ROOT / "configs/base.yml"),
            "num_decoder_layers=2",
            "emb_dim=32",
            "head_dim=16",
            "num_query_heads=2",
            "vocab_size=300",
            "max_target_length=32",
            "short_window_multiple=16",
            "global_batch_tokens=256",
            f"steps={STEPS}",
            "data_readers=2",
            "packing_buffer_documents=20",
            "dataset_path=gs://anonymous@ours/text",
            "tokenizer_path=gs://ours/tokenizer",
            "base_output_directory=gs://ours/runs",
            "num_cpu_devices=1",
            "eval_interval=0",
            "eval_tokens=256",
            "sample_interval=0",
            "checkpoint_interval_steps=2",
            "checkpoint_keep=2",
            "warmup_steps=2",
            "embedding_lr=30",
            "tensorboard=false",
            f"jax_cache_dir={os.environ['MAXNANO_TEST_CACHE']}",
            f"run_name={run_name}",
            *more,
        ]
        words = [word for word in words if word.split("=")[0] not in without]
        env = {**os.environ, **self.store.env}
        return subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env
        )

    def run(self, *arguments, **options):
        return self.finish(self.start(*arguments, **options))

    def finish(self, process, status=0):
        """Its output; a failure is one line."""
        out, err = process.communicate(timeout=280)
        err = "".join(line for line in err.splitlines(True) if "GOOGLE_AUTH_TOKEN" not in line)
        assert process.returncode == status, out + err
        return out + err

    def names(self, folder):
        return set(self.store.objects(folder))

    def losses(self, run_name):
        """Step -> (loss, bpb, norm of the gradient), exact."""
        text = self.store.objects(f"runs/{run_name}/metrics.jsonl")[
            f"runs/{run_name}/metrics.jsonl"
        ].decode()
        rows = [row for row in map(json.loads, text.splitlines()) if "event" not in row]
        return {row["step"]: (row["loss"], row["bpb"], row["grad_norm"]) for row in rows}

    def steps(self, run_name):
        """(steps of which anything is stored, steps that are whole)."""
        prefix = f"runs/{run_name}/checkpoints/"
        names = [name.removeprefix(prefix) for name in self.names(prefix)]
        whole = [name for name in names if name.endswith("MANIFEST.json")]
        return {int(name.split("/")[0]) for name in names}, {
            int(name.split("/")[0]) for name in whole
        }


@pytest.fixture(scope="module")
def place():
    with object_store.serve() as store:
        place = Place(store)
        place.run("MaxNano/train_tokenizer.py", "none")
        place.run("MaxNano/train.py", "whole")
        yield place


@pytest.mark.long
def test_killed_and_stopped_in_the_middle_of_uploads_it_goes_on_bit_for_bit_and_can_be_used(place):
    store = place.store
    assert list(place.losses("whole")) == list(range(STEPS))
    assert place.steps("whole") == ({6, 8}, {6, 8})

    # kill -9 while the arrays of step 4 are half uploaded
    fault = store.fail("hang", "write", r"runs/broken/checkpoints/4/state/ocdbt.process_0/d/")
    process = place.start("MaxNano/train.py", "broken")
    fault.wait()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    store.mend()
    assert place.steps("broken") == ({2, 4}, {2})

    # SIGTERM while the manifest of step 4 is on its way, in a store that is slow and often busy:
    # the save of step 6 waits for it, and step 7 is where the run stops.
    store.slow(latency_seconds=0.02, writes_per_second=1)
    fault = store.fail("hang", "write", r"runs/broken/checkpoints/4/MANIFEST")
    process = place.start("MaxNano/train.py", "broken")
    fault.wait()
    assert place.steps("broken") == ({2, 4}, {2})
    process.send_signal(signal.SIGTERM)
    store.mend()
    out = place.finish(process, status=75)
    assert "Resuming gs://ours/runs/broken from step 2" in out
    assert "the checkpoint of step 4 in gs://ours/runs/broken is unfinished; removed" in out
    store.slow()
    found, whole = place.steps("broken")
    assert found == whole and max(whole) < STEPS

    place.run("MaxNano/train.py", "broken")
    assert STEPS in place.steps("broken")[1] and len(place.steps("broken")[0]) == 2
    assert place.losses("broken") == place.losses("whole"), "every step once, to the last bit"

    # What a finished run is used for
    out = place.run("MaxNano/evaluate.py", "broken", "evals=bpb")
    assert "Wrote results to gs://ours/runs/broken/evals/step_000008.json" in out
    out = place.run("MaxNano/train.py", "next", "load_from=broken", "steps=1")
    assert "Starting from step 8 of gs://ours/runs/broken" in out and place.steps("next") == (
        {1},
        {1},
    )
    place.run("MaxNano/chat.py", "broken", "prompt=the quick", "max_new_tokens=4")
    out = place.run("MaxNano/report.py", "next")
    assert "Wrote gs://ours/runs/next/report.html" in out and "runs/next/report.md" in place.names(
        "runs/next/"
    )
    assert "finished" in place.run("end_to_end/results.py", "broken", before=["state"])


@pytest.mark.slow
def test_fine_tuning_starts_from_a_run_in_the_bucket(place, tmp_path):
    talk = [("user", "the quick"), ("assistant", "brown fox jumps over a lazy dog")]
    line = json.dumps([{"role": role, "content": content} for role, content in talk])
    file = tmp_path / "talks.jsonl"
    file.write_text(24 * (line + "\n"))
    mixture = [f"chat_{split}_mixture=[[json:{file}, 1]]" for split in ("train", "validation")]
    out = place.run(
        "MaxNano/train.py",
        "tuned",
        "stage=sft",
        "load_from=whole",
        "chat_interval=0",
        *mixture,
        without=("steps", "dataset_path"),
    )
    assert f"Starting from step {STEPS} of gs://ours/runs/whole" in out
    steps = list(place.losses("tuned"))
    assert steps and steps == list(range(len(steps))) and max(place.steps("tuned")[1]) == len(steps)


@pytest.mark.slow
def test_two_processes_share_a_run_in_the_bucket(place):
    """Stopped by SIGTERM they save together, and resumed they have each step once, with every number
    of two that nobody stopped and the losses of one process.
    """

    def start(run_name):
        more = [
            f"coordinator_address=127.0.0.1:{free_port()}",
            "num_processes=2",
            "dcn_data_parallelism=2",
        ]
        return [
            place.start("MaxNano/train.py", run_name, *more, f"process_id={index}")
            for index in range(2)
        ]

    processes = start("two")
    try:
        for process in processes:
            place.finish(process)
        fault = place.store.fail("hang", "write", r"runs/stopped/checkpoints/2/MANIFEST")
        processes = start("stopped")
        fault.wait()
        for process in processes:
            process.send_signal(signal.SIGTERM)
        place.store.mend()
        for process in processes:
            place.finish(process, status=75)
        step = max(place.steps("stopped")[1])
        assert 2 <= step < STEPS
        processes = start("stopped")
        out = "".join(place.finish(process) for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert f"Resuming gs://ours/runs/stopped from step {step}" in out
    found, alone = place.losses("stopped"), place.losses("whole")
    assert list(found) == list(range(STEPS))
    assert found == place.losses("two"), "to the last bit"
    for step, (loss, bpb, _) in found.items():
        # The norm of the gradient grows apart from that of one process: by rounding alone, to 1e-5
        # at the last step.
        assert (loss, bpb) == pytest.approx(alone[step][:2], rel=1e-6)
