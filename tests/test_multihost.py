"""Several processes of one run: the losses of one process, one checkpoint, one end."""

import os
import shutil
import signal
import tempfile
import textwrap
import time
from pathlib import Path

import object_store
import programs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ports import free_port

from MaxNano.tokenization.bpe import train_bpe

ROOT = Path(__file__).parents[1]
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards mix strange and bright potions".split()
STEPS = 10
BY_ENVIRONMENT = ("JAX_", "SLURM_", "TPU_", "MEGASCALE_")
SET_BY_CONFTEST = ("JAX_PLATFORMS", "JAX_TRACEBACK_IN_LOCATIONS_LIMIT")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with documents, a tokenizer and a compilation cache that all runs share."""
    folder = tmp_path_factory.mktemp("multihost")
    (folder / "text").mkdir()
    for shard in range(3):
        texts = [
            " ".join(WORDS[(i * j + shard) % len(WORDS)] for j in range(3 + i % 60))
            for i in range(300)
        ]
        pq.write_table(
            pa.table({"text": texts}), folder / f"text/shard_{shard}.parquet", row_group_size=50
        )
    train_bpe(texts, 300).save(folder / "tokenizer")
    return folder


def words_of(place, run_name, *more):
    return [
        str(ROOT / "configs/base.yml"),
        "num_decoder_layers=1",
        "window_pattern=L",
        "muon_iterations=1",
        "emb_dim=32",
        "head_dim=16",
        "num_query_heads=2",
        "vocab_size=300",
        "max_target_length=32",
        "global_batch_tokens=512",
        f"steps={STEPS}",
        "data_readers=2",
        "packing_buffer_documents=20",
        f"dataset_path={place}/text",
        f"tokenizer_path={place}/tokenizer",
        f"jax_cache_dir={os.environ['MAXNANO_TEST_CACHE']}",
        f"base_output_directory={place}/runs",
        "eval_interval=5",
        "eval_tokens=1024",
        "sample_interval=10",
        "sample_tokens=4",
        "checkpoint_interval_steps=5",
        "warmup_steps=2",
        "embedding_lr=30",
        "tensorboard=false",
        f"run_name={run_name}",
        *more,
    ]


ONE = ("num_cpu_devices=4",)
TWO = ("num_cpu_devices=2", "dcn_data_parallelism=2")


def clean(**env):
    """This environment without what could tell JAX of other processes."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in SET_BY_CONFTEST or not name.startswith(BY_ENVIRONMENT)
    }
    return {**kept, **env}


STARTED = []


@pytest.fixture(autouse=True)
def leave_none_behind():
    """A process that waits for one that failed would wait for minutes."""
    yield
    for process in STARTED:
        process.kill()
        process.communicate()
    STARTED.clear()


def start_python(*words, **env):
    process = programs.start(*words, env=clean(**env))
    STARTED.append(process)
    return process


def start(words, pause=None, **env):
    """train.py, with a pause of so many seconds before each step if a test interrupts it."""
    if pause is not None:
        return start_python(str(ROOT / "tests/slow_train.py"), str(pause), *words, **env)
    return start_python(str(ROOT / "MaxNano/train.py"), *words, **env)


def start_two(words, by="keys", pause=None):
    """The same command twice, told by `by` who they are."""
    address = f"127.0.0.1:{free_port()}"
    if by == "keys":
        keys = [*words, f"coordinator_address={address}", "num_processes=2"]
        return [start([*keys, f"process_id={index}"], pause) for index in range(2)]
    env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [start(words, pause, **env, JAX_PROCESS_ID=str(index)) for index in range(2)]


def finish(processes, status=0):
    """What each wrote; all must end with `status`."""
    written = [process.communicate() for process in processes]
    for process, (out, err) in zip(processes, written, strict=True):
        assert process.returncode == status, out + err
    return written


def rows_of(place, run_name):
    return programs.rows_of(place / "runs" / run_name)


def losses_of(place, run_name):
    """(step, loss, bpb, norm of the gradient) of every step."""
    rows = [row for row in rows_of(place, run_name) if "event" not in row]
    return [(row["step"], row["loss"], row["bpb"], row["grad_norm"]) for row in rows]


def assert_same_losses(place, run_name):
    """Those of all steps, of which none is missing or there twice, and of every validation."""
    found, expected = losses_of(place, run_name), losses_of(place, "one")
    assert [step for step, *_ in found] == list(range(STEPS))
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5)

    def validations(name):
        return [row["bpb"] for row in rows_of(place, name) if row.get("event") == "validation"]

    assert validations(run_name) == pytest.approx(validations("one"), rel=1e-5)


def wait_for_step(place, run_name, step, processes):
    path = place / "runs" / run_name / "metrics.jsonl"
    while all(process.poll() is None for process in processes):
        if path.exists() and f'"step": {step}' in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(
        f"never saw step {step}: {[process.communicate() for process in processes]}"
    )


def steps_saved(place, run_name):
    return sorted(int(path.name) for path in (place / "runs" / run_name / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def one(place):
    """The run that the others are compared with: one process with as many devices."""
    finish([start(words_of(place, "one", *ONE))])


def copy_of_first_checkpoint(place, run_name, copy):
    """A run that was killed after its first checkpoint."""
    shutil.copytree(place / "runs" / run_name, place / "runs" / copy)
    for step in steps_saved(place, copy)[1:]:
        shutil.rmtree(place / "runs" / copy / "checkpoints" / str(step))


@pytest.mark.slow
def test_two_processes_told_by_the_environment_give_the_losses_of_one(place, one):
    (out, _), (other_out, _) = finish(start_two(words_of(place, "two", *TWO), by="environment"))
    assert_same_losses(place, "two")
    assert f"step  {STEPS - 1}/{STEPS}" in out and "4 x cpu, data 4" in out
    assert "loss" not in other_out, "only process 0 speaks"


@pytest.mark.slow
def test_tensor_parallelism_over_the_processes_gives_the_losses_of_one(place, one):
    """The axis that spans the processes does not shard the batch, so both read all of it."""
    layout = ("num_cpu_devices=4", "dcn_tensor_parallelism=2")
    (out, _), _ = finish(start_two(words_of(place, "tensor", *layout)))
    assert "data 4 x fsdp 1 x tensor 2" in out
    assert_same_losses(place, "tensor")


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(place, one):
    copy_of_first_checkpoint(place, "one", "one_then_two")
    (out, _), _ = finish(start_two(words_of(place, "one_then_two", *TWO), by="environment"))
    assert "from step 5" in out
    assert_same_losses(place, "one_then_two")


@pytest.mark.slow
def test_asked_to_stop_both_save_one_step_and_one_process_goes_on(place, one):
    words = words_of(place, "stopped", "checkpoint_interval_steps=0")
    # JAX looks for the signal once a second.
    processes = start_two([*words, *TWO], pause=1)
    wait_for_step(place, "stopped", 1, processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    (out, _), (other_out, _) = finish(processes, status=75)
    assert "4 x cpu, data 4" in out and "loss" not in other_out, "only process 0 speaks"
    (step,) = steps_saved(place, "stopped")
    assert 1 < step < STEPS and f"Saved checkpoint at step {step}" in out
    out, _ = finish([start([*words, *ONE])])[0]
    assert f"from step {step}" in out
    assert_same_losses(place, "stopped")


@pytest.mark.slow  # a minute; tests/test_runtime.py has the agreement of the processes
def test_data_that_fail_in_one_process_stop_both_with_one_checkpoint(place, one):
    """A part that only the readers of process 1 come to: the run ended unsaved."""
    (place / "damaged").mkdir()
    for shard in sorted((place / "text").iterdir()):
        options = {"row_group_size": 10, "write_page_checksum": True, "use_dictionary": False}
        pq.write_table(pq.read_table(shard), place / "damaged" / shard.name, **options)
    path = place / "damaged/shard_0.parquet"
    column = pq.ParquetFile(path).metadata.row_group(9).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 3] ^= 0xFF
    path.write_bytes(content)
    values = ("checkpoint_interval_steps=0", "packing_buffer_documents=5", "steps=20")
    words = words_of(place, "damaged", f"dataset_path={place}/damaged", *values)
    (out, err), (_, other_err) = finish(start_two([*words, *TWO]), status=2)
    (step,) = steps_saved(place, "damaged")
    assert 1 < step < 20 and f"Saved checkpoint at step {step}; the same command resumes" in out
    for text, start_of_line in ((err, "error: process 1: "), (other_err, "error: ")):
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert line.startswith(start_of_line + str(path)) and "Traceback" not in text
        assert "row group 9: cannot be read" in line and "skip_corrupt_data=true" in line
    before = losses_of(place, "damaged")
    assert [row[0] for row in before] == list(range(step))

    (out, _), _ = finish(start_two([*words, "skip_corrupt_data=true", *TWO]))
    assert f"from step {step}" in out
    rows = losses_of(place, "damaged")
    assert rows[:step] == before and [row[0] for row in rows] == list(range(20))


IN_EACH_PROCESS = """
    import resource, sys

    sys.stdout = open(sys.argv.pop(), "w", 1)  # Gloo writes its lines to the other one in pieces
    import filelock, jax, numpy as np
    from MaxNano import pyconfig
    from MaxNano.training import checkpointing
    from MaxNano.distributed import runtime, sharding
    from MaxNano.distributed.mesh import make_mesh
    from MaxNano.data import loader

    port, index, run = sys.argv[1:]
    place = [f"coordinator_address=127.0.0.1:{port}", "num_processes=2", f"process_id={index}"]

    def config_of(*words):
        return pyconfig.initialize(["configs/base.yml", "model=d2", "jax_cache_dir=", *place, *words])

    runtime.initialize(config_of("num_cpu_devices=2"))
    numbers = np.random.default_rng(0).normal(size=(400, 300)).astype(np.float32)
"""

LOADING = """
    for word in ("dcn_data_parallelism=2", "dcn_tensor_parallelism=2"):
        config = config_of(word)
        rows = sharding.batch_sharding(make_mesh(config), config.logical_axis_rules)
        share = loader.host_share(rows, 400)
        mine = np.split(numbers, share["host_count"])[share["host_index"]]
        batch = loader.put_global({"numbers": mine}, rows)["numbers"]
        parts = [np.array_equal(part.data, numbers[part.index]) for part in batch.addressable_shards]
        print(index, *share.values(), batch.shape == numbers.shape and all(parts))
"""

SAVING = """
    checkpointing.SAVE_TIMEOUT_SECONDS = 8
    config = config_of()
    layout = sharding.batch_sharding(make_mesh(config), config.logical_axis_rules)
    state = {"w": jax.make_array_from_callback(numbers.shape, layout, lambda part: numbers[part])}
    with checkpointing.Checkpointer(config, run) as checkpointer:
        checkpointer.save(1, state, {})
        checkpointer.wait()
        if index == "1":  # a limit on file sizes stands in for a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        checkpointer.save(2, state, {})
        checkpointer._saver.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        checkpointer.save(3, state, {})
        checkpointer.wait()
        print("saved", checkpointer.latest_step(), checkpointer._saver.failures)
    if index == "0":
        holder = filelock.FileLock(f"{run}/.lock")
        holder.acquire()
    try:
        checkpointing.Checkpointer(config, run)
    except checkpointing.CheckpointError as error:
        print("refused:", error)
"""

SAVING_IN_A_BUCKET = """
    checkpointing.SAVE_TIMEOUT_SECONDS = 8
    config = config_of()
    layout = sharding.batch_sharding(make_mesh(config), config.logical_axis_rules)
    state = {"w": jax.make_array_from_callback(numbers.shape, layout, lambda part: numbers[part])}
    with checkpointing.Checkpointer(config, run) as checkpointer:
        for step in (1, 2, 3):  # the second fails in process 1
            checkpointer.save(step, state, {})
        checkpointer.wait()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        again = checkpointer.restore(abstract)[0]["w"]
        same = all(np.array_equal(part.data, numbers[part.index]) for part in again.addressable_shards)
        print("saved", checkpointer.latest_step(), checkpointer._saver.failures, same)
"""


COMPARING = """
    from pathlib import Path
    from MaxNano.training import run_record

    numbers = "seed=3" if index == "1" else "seed=2"
    shards = ["0.jsonl", "1.jsonl", "2.jsonl"]
    mine = Path(run) / index
    mine.mkdir()
    for shard in shards[int(index):]:
        (mine / shard).write_text('{"text": "a"}')
    tokenizer = (f"tokenizer_path={run}", "vocab_size=300")
    for words in (
        (),
        (numbers, f"log_interval={index}1"),
        ("dataset_type=jsonl", f"dataset_path={mine}"),
        ("dataset_type=jsonl", f"dataset_path={run}/0" if index == "0" else "dataset_path=nowhere"),
    ):
        try:
            run_record.check_processes(config_of(*tokenizer, "dataset_type=synthetic", *words))
            print("same")
        except ValueError as error:
            print(error)
"""


def run_two(code, folder):
    """What each of two processes prints."""
    code, port = textwrap.dedent(IN_EACH_PROCESS) + textwrap.dedent(code), str(free_port())
    with tempfile.TemporaryDirectory() as printed:
        files = [Path(printed) / str(index) for index in range(2)]
        written = finish(
            [
                start_python("-c", code, port, str(index), str(folder), str(file))
                for index, file in enumerate(files)
            ]
        )
        return [
            (file.read_text().splitlines(), err)
            for file, (_, err) in zip(files, written, strict=True)
        ]


def test_hosts_read_the_rows_that_their_devices_need(tmp_path):
    (lines, _), (other_lines, _) = run_two(LOADING, tmp_path)
    assert lines == ["0 0 2 True", "0 0 1 True"]
    assert other_lines == ["1 1 2 True", "1 0 1 True"]


def test_processes_that_differ_are_refused_in_one_line_that_names_the_difference(tmp_path):
    train_bpe([" ".join(WORDS)], 300).save(tmp_path)
    (lines, _), (other_lines, _) = run_two(COMPARING, tmp_path)
    assert lines == other_lines
    same, seed, shard, nowhere = lines
    assert same == "same"
    assert "process 1 has seed=3 instead of 2 in process 0" in seed and "log" not in seed
    assert "in process 1 in the train data 0.jsonl is missing, compared with process 0" in shard
    assert nowhere.startswith("process 1: dataset_path=nowhere")


def test_processes_with_other_values_end_with_status_2(place):
    """By the command, which trained a wrong model and ended with status 0."""
    words = words_of(place, "unlike", *TWO)
    address = f"127.0.0.1:{free_port()}"
    keys = [*words, f"coordinator_address={address}", "num_processes=2"]
    started = [
        start([*keys, f"process_id={index}", f"matrix_lr=0.0{index + 2}"]) for index in range(2)
    ]
    for _, err in finish(started, status=2):
        line = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(line) == 1 and "process 1 has matrix_lr=0.03 instead of 0.02" in line[0]
    assert not (place / "runs/unlike").exists()


@pytest.mark.slow
def test_two_processes_share_a_run_in_a_bucket(monkeypatch):
    with object_store.serve() as store:
        object_store.use(store, monkeypatch)
        store.fail(403, "write", "/2/.*process_1/", count=None)
        (lines, err), (other_lines, _) = run_two(SAVING_IN_A_BUCKET, f"{store.bucket}/run")
        kept = {name.split("/")[2] for name in store.objects("run/checkpoints/")}
    assert lines == other_lines == ["saved 3 0 True"]
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert (
        len(warnings) == 1 and "the checkpoint of step 2 could not be written (" in warnings[0]
    ), err
    assert {"1", "3"} <= kept


@pytest.mark.slow
def test_what_one_process_cannot_write_all_of_them_know(tmp_path):
    (lines, err), (other_lines, _) = run_two(SAVING, tmp_path)
    assert lines == other_lines
    assert lines[0] == "saved 3 0"
    assert lines[1].startswith("refused: another process is writing to")
    warnings = [
        line for line in err.splitlines() if line.startswith("warning: the checkpoint of step 2")
    ]
    assert len(warnings) == 1 and "File too large" in warnings[0]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "3"]
