"""Checkpoints come back bit for bit or not at all: after kill -9, damage, full disks, rivals."""

import json
import re
import resource
import signal
import subprocess
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict, FrozenConfigDict
from orbax.checkpoint.utils import TMP_DIR_SUFFIX

from MaxNano import console, pyconfig, scaling
from MaxNano.storage import checkpoints
from MaxNano.storage.checkpoints import MANIFEST, CheckpointError
from MaxNano.training import checkpointing
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.state import TrainState

ROOT = Path(__file__).resolve().parents[1]


def make_config(*words):
    return pyconfig.initialize([str(pyconfig.BASE), "model=d2", "vocab_size=256", *words])


def make_state(seed: int) -> TrainState:
    """A state with float32, bfloat16 and int32 leaves, scalars and optimizer state."""
    rng = np.random.default_rng(seed)
    params = {
        "token_embed": jnp.asarray(rng.normal(size=(64, 16)), jnp.bfloat16),
        "layers": {"mlp": {"wi": jnp.asarray(rng.normal(size=(2, 16, 32)), jnp.float32)}},
        "smear_lambda": jnp.asarray(rng.normal(), jnp.float32),
    }
    return TrainState(jnp.asarray(seed, jnp.int32), params, optax.adam(1e-3).init(params))


def abstract(state):
    """Shapes of the state, on one device."""
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A run with intact checkpoints 1 and 2; copied by the tests that damage it."""
    run = tmp_path_factory.mktemp("run")
    with Checkpointer(make_config(), run) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step), {"data": {"position": step}})
    return run


@pytest.fixture
def run(two_checkpoints, tmp_path):
    subprocess.run(["cp", "-r", two_checkpoints, tmp_path / "run"], check=True)
    return tmp_path / "run"


def restore(run, **options):
    with Checkpointer(make_config(), run, writer=False) as checkpointer:
        return checkpointer.restore(abstract(make_state(0)), **options)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_restores_what_was_saved(tmp_path, asynchronous):
    config = make_config(f"async_checkpointing={asynchronous}")
    with Checkpointer(config, tmp_path, tokenizer_fingerprint="abc") as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.save(7, make_state(7), {"data": {"buffers": [[1, 2], []]}, "best": 1.5})
        checkpointer.wait()
        assert checkpointer.latest_step() == 7
        state, extra = checkpointer.restore(abstract(make_state(0)))
        assert_same(state, make_state(7))
        assert extra["data"] == {"buffers": [[1, 2], []]} and extra["best"] == 1.5
        assert extra["run"]["tokenizer"] == "abc"
        assert extra["run"]["config"]["emb_dim"] == config.emb_dim
        assert extra["run"]["versions"]["jax"] == jax.__version__
        assert (
            extra["run"]["devices"]["kind"] == "cpu"
            and extra["run"]["devices"]["count"] == jax.device_count()
        )
        assert extra["run"]["step"] == 7
        params, extra = checkpointer.restore_params_only(abstract(make_state(0).params))
        assert_same(params, make_state(7).params)
        params, _ = checkpointer.restore_params_only()
        assert_same(params, make_state(7).params)
        checkpointer.save(7, make_state(8), {})  # stands already
        checkpointer.wait()
        assert_same(checkpointer.restore(abstract(make_state(0)))[0], make_state(7))
        assert extra == checkpointer.read_extra()


def test_keeps_the_last_checkpoints(tmp_path):
    with Checkpointer(make_config("checkpoint_keep=2"), tmp_path) as checkpointer:
        for step in (1, 2, 10, 11):
            checkpointer.save(step, make_state(step), {})
        checkpointer.wait()
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "11"]
        assert_same(checkpointer.restore(abstract(make_state(0)), step=10)[0], make_state(10))
        with pytest.raises(CheckpointError, match="no checkpoint of step 2"):
            checkpointer.restore(abstract(make_state(0)), step=2)


def test_saves_what_the_state_was_when_later_steps_donate_it(tmp_path):
    step_forward = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = step_forward({"w": jnp.zeros((1000, 1000)), "b": jnp.zeros(())})
    with Checkpointer(make_config(), tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        for _ in range(10):
            state = step_forward(state)
        jax.block_until_ready(state)
        checkpointer.wait()
        saved, _ = checkpointer.restore(abstract(state))
    assert_same(saved, {"w": jnp.ones((1000, 1000)), "b": jnp.ones(())})


def test_restores_onto_other_devices(tmp_path):
    """Saved by 8 devices, cut along different axes; read by one."""
    code = f"""
        import jax
        jax.config.update("jax_num_cpu_devices", 8)
        jax.config.update("jax_platforms", "cpu")
        from jax.sharding import NamedSharding, PartitionSpec as P
        from MaxNano.training.checkpointing import Checkpointer
        from tests.test_checkpointing import make_config, make_state
        mesh = jax.make_mesh((4, 2), ("a", "b"))
        specs = [P(), P("b"), P("a", "b"), P(None, "a", "b")]
        def place(x):
            return jax.device_put(x, NamedSharding(mesh, specs[x.ndim]))
        state = jax.tree.map(place, make_state(3))
        assert len(state.params["token_embed"].sharding.device_set) == 8
        with Checkpointer(make_config(), {str(tmp_path)!r}) as checkpointer:
            checkpointer.save(3, state, {{}})
    """
    done = programs.run("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    assert_same(restore(tmp_path)[0], make_state(3))


def test_kill_during_save_leaves_an_intact_checkpoint(tmp_path):
    """kill -9 while a process saves, then while the one that resumes saves."""
    code = f"""
        import sys
        from MaxNano.training.checkpointing import Checkpointer
        from tests.test_checkpointing import make_config, make_state
        checkpointer = Checkpointer(make_config(), {str(tmp_path)!r})
        step = checkpointer.latest_step() or 0
        while True:
            step += 1
            checkpointer.save(step, make_state(step), {{"data": step}})
            print(step, flush=True)
    """
    previous = 0
    for lines in (2, 7):
        process = programs.start("-c", textwrap.dedent(code))
        for _ in range(lines):
            begun = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with Checkpointer(make_config(), tmp_path) as checkpointer:  # as the resumed run: a writer
            newest = checkpointer.latest_step()
            # The save that printed `begun` had waited for the one before it.
            assert (newest or 0) >= max(previous, begun - 1)
            if newest is not None:
                state, extra = checkpointer.restore(abstract(make_state(0)))
                assert_same(state, make_state(newest))
                assert extra["data"] == newest
            assert not list((tmp_path / "checkpoints").glob("*tmp*"))
        previous = newest or 0
    assert previous > 0


def damage_cases():
    """Bits flipped all over the files of a checkpoint, files cut short, files gone."""
    return [
        *(("flip", i) for i in range(20)),
        *(("cut", i) for i in range(2)),
        ("gone", 0),
        ("gone", 1),
    ]


@pytest.mark.parametrize("kind,number", damage_cases())
def test_damage_is_detected_and_the_previous_checkpoint_used(run, capfd, kind, number):
    newest = run / "checkpoints" / "2"
    files = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size > 0)
    rng = np.random.default_rng(number)
    path = files[(number * 5) % len(files)]
    content = bytearray(path.read_bytes())
    if kind == "flip":
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(content[: rng.integers(len(content))])
    else:
        path.unlink()
    with Checkpointer(make_config(), run) as checkpointer:
        state, extra = checkpointer.restore(abstract(make_state(0)))
        step = extra["data"]["position"]
        assert_same(state, make_state(step))  # never garbage ...
        if path.name != MANIFEST:
            assert step == 1  # ... and where the data is hurt, never its checkpoint
        if step == 1:
            warning = capfd.readouterr().err.strip()
            assert warning.startswith("warning: the checkpoint of step 2") and "\n" not in warning
            # The run goes on and keeps the intact one beside the new one.
            checkpointer.save(2, make_state(20), {})
            checkpointer.wait()
            assert_same(checkpointer.restore(abstract(make_state(0)))[0], make_state(20))
            assert_same(checkpointer.restore(abstract(make_state(0)), step=1)[0], make_state(1))


def test_one_line_where_every_checkpoint_is_damaged(run):
    for path in (run / "checkpoints").rglob("ocdbt.process_0/d/*"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="no checkpoint in .* is intact") as caught:
        restore(run)
    assert "\n" not in str(caught.value)
    assert not list((run / "checkpoints").glob("*.damaged"))  # a reader changes nothing


def test_reader_works_beside_a_writer_and_a_second_writer_is_refused(run):
    with Checkpointer(make_config(), run):
        with pytest.raises(CheckpointError, match="another process is writing to") as caught:
            Checkpointer(make_config(), run)
        assert "\n" not in str(caught.value)
        assert_same(restore(run)[0], make_state(2))
    Checkpointer(make_config(), run).close()  # free again


def test_another_model_or_tokenizer_is_refused(tmp_path):
    with Checkpointer(make_config(), tmp_path, tokenizer_fingerprint="a" * 64) as checkpointer:
        checkpointer.save(1, make_state(1), {})
    other = make_config("mlp_dim=96")
    checkpointer = Checkpointer(other, tmp_path, writer=False)
    with pytest.raises(CheckpointError, match=r"^mlp_dim is 512 .* but 96 now"):
        checkpointer.restore(abstract(make_state(0)))
    checkpointer = Checkpointer(
        make_config(), tmp_path, tokenizer_fingerprint="b" * 64, writer=False
    )
    with pytest.raises(CheckpointError, match="tokenizer .* aaaaaaaa.* bbbbbbbb"):
        checkpointer.restore(abstract(make_state(0)))


def test_a_checkpoint_from_before_a_key_existed_loads_with_the_value_it_implies(
    tmp_path, monkeypatch
):
    """A key that a later version adds: older checkpoints load with its default, and only with it."""
    with Checkpointer(make_config(), tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), {})
    assert "mlp_activation" not in scaling.ARCHITECTURE_KEYS
    monkeypatch.setitem(scaling.ARCHITECTURE_KEYS, "mlp_activation", "relu2")
    for value in ("relu2", "swiglu"):
        config = ConfigDict({**make_config(), "mlp_activation": value})
        later = Checkpointer(FrozenConfigDict(config), tmp_path, writer=False)
        if value == "relu2":
            assert_same(later.restore(abstract(make_state(0)))[0], make_state(1))
            continue
        with pytest.raises(
            CheckpointError, match="^mlp_activation is relu2 in the .* but swiglu now"
        ):
            later.restore(abstract(make_state(0)))


def test_failed_saves_are_reported_retried_and_stop_the_third_time(tmp_path, capfd):
    """A limit on file sizes stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(300, 300)), jnp.float32)}
    checkpointer = Checkpointer(make_config(), tmp_path)

    def save_without_room(step):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            checkpointer.save(step, large, {})
            checkpointer._saver.join()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    checkpointer.save(1, large, {})
    checkpointer.wait()
    for step in (2, 3):
        save_without_room(step)
        checkpointer.should_save(step + 1)
        assert (
            f"warning: the checkpoint of step {step} could not be written" in capfd.readouterr().err
        )
        assert checkpointer.latest_step() == 1
    checkpointer.save(4, large, {})  # room again: counted anew
    checkpointer.wait()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "4"]
    for step in (5, 6):
        save_without_room(step)
        checkpointer.check()
    save_without_room(7)
    with pytest.raises(CheckpointError, match="3 checkpoints in a row"):
        checkpointer.check()
    save_without_room(8)
    with pytest.raises(CheckpointError, match="step 8 could not be written"):
        checkpointer.close()
    assert_same(restore_tree(tmp_path, large), large)


def restore_tree(run, tree):
    with Checkpointer(make_config(), run, writer=False) as checkpointer:
        return checkpointer.restore(abstract(tree))[0]


def test_free_space_is_checked_before_training(tmp_path):
    huge = {"w": jax.ShapeDtypeStruct((10**8, 10**8), jnp.float32)}
    with Checkpointer(make_config(), tmp_path) as checkpointer:
        checkpointer.check_free_space(make_state(0))
        with pytest.raises(CheckpointError, match="GB free but checkpoints need"):
            checkpointer.check_free_space(huge)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 kB"), (614_400, "614.4 kB"), (2.2e6, "2.2 MB"), (1e15, "1000000.0 GB")],
)
def test_sizes_have_a_unit_in_which_they_are_not_0(size, text):
    """A disk had "0.0 GB free but checkpoints need 0.0 GB"."""
    assert console.bytes_text(size) == text


def test_due_by_steps_and_by_minutes(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: now[0])
    config = make_config("checkpoint_interval_steps=5", "checkpoint_interval_minutes=2")
    with Checkpointer(config, tmp_path) as checkpointer:
        assert [s for s in range(1, 12) if checkpointer.should_save(s)] == [5, 10]
        now[0] += 119
        assert not checkpointer.should_save(11)
        now[0] += 1
        assert checkpointer.should_save(11)
        checkpointer.save(11, make_state(11), {})
        assert not checkpointer.should_save(11)
        assert not checkpointer.should_save(12)
    config = make_config("checkpoint_interval_steps=0", "checkpoint_interval_minutes=0")
    with Checkpointer(config, tmp_path) as checkpointer:
        now[0] += 1e9
        assert not any(checkpointer.should_save(s) for s in range(1, 100))


def test_unfinished_checkpoints_are_named_as_orbax_does():
    assert re.fullmatch(checkpoints.TEMPORARY, f"12{TMP_DIR_SUFFIX}.1")
    assert not re.fullmatch(checkpoints.TEMPORARY, "12")


def test_manifest_lists_every_file_and_is_json(run):
    newest = run / "checkpoints" / "2"
    listed = set(json.loads((newest / MANIFEST).read_text())["files"])
    present = {str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file()}
    assert listed == present - {MANIFEST}
