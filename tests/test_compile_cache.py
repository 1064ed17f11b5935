"""Compiled programs in an object store: found by the next machine, harmless when damaged, waited
for by nobody.
"""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import object_store
import pytest

from MaxNano import pyconfig
from MaxNano.distributed import compile_cache, runtime
from MaxNano.storage.bucket import Bucket

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "gs://ours/runs/.jax_cache"


@pytest.fixture
def store(served, monkeypatch):
    """An object store without programs or faults, to which gcsfs in this process speaks."""
    object_store.use(served, monkeypatch)
    Bucket.clear_instance_cache()
    yield served
    served.mend()
    for name in served.objects():
        served.delete(name)


def programs_of_another_machine():
    Bucket.clear_instance_cache()
    return compile_cache._RemoteCache(FOLDER)


def get(programs, name):
    """As JAX looks an entry up."""
    return programs.read(name) if programs.exists(name) else None


def put(name="a-cache", entry=b"program" * 1000):
    programs = compile_cache._RemoteCache(FOLDER)
    assert get(programs, name) is None
    programs.write(name, entry)
    assert get(programs, name) == entry, "while it is on its way too"
    programs.finish()
    assert get(programs, name) == entry
    return entry


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "~/.cache/maxnano/jax"),
        (["base_output_directory=/disk/runs"], "~/.cache/maxnano/jax"),
        (["base_output_directory=gs://ours/runs/"], "gs://ours/runs/.jax_cache"),
        (["base_output_directory=gs://ours/runs", "jax_cache_dir=/disk"], "/disk"),
        (["jax_cache_dir=gs://ours/programs"], "gs://ours/programs"),
        (["base_output_directory=gs://ours/runs", "jax_cache_dir="], ""),
    ],
)
def test_where_programs_are_kept(words, expected):
    assert runtime.cache_folder(pyconfig.initialize([str(pyconfig.BASE), *words])) == expected


def test_another_machine_finds_a_program(store):
    entry = put()
    other = programs_of_another_machine()
    assert get(other, "a-cache") == entry and get(other, "b-cache") is None
    operations = [operation for operation, *_ in store.requests]
    assert operations.count("list") == 2 and operations.count("write") == 1, (
        "no request for what is not there"
    )


@pytest.mark.parametrize("damage", ["truncated", "changed", "emptied", "deleted", "not as ours"])
def test_a_damaged_program_is_none_and_is_replaced(store, damage, capfd):
    entry = put()
    (content,) = store.objects().values()
    name = "runs/.jax_cache/a-cache"
    other = programs_of_another_machine()
    other._names.result()
    if damage == "deleted":
        store.delete(name)
    else:
        changed = content[:50] + bytes([content[50] ^ 1]) + content[51:]
        store.put(
            name, {"truncated": content[:-1], "changed": changed, "emptied": b""}.get(damage, entry)
        )
    assert get(other, "a-cache") is None
    other.write("a-cache", entry)
    other.finish()
    assert store.objects() == {name: hashlib.sha256(entry).digest() + entry}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("operation", ["list", "read"])
@pytest.mark.parametrize("fault", [503, 403, "hang"])
def test_a_store_that_cannot_be_read_costs_one_time_limit_and_one_warning(
    store, operation, fault, monkeypatch, capfd
):
    put()
    monkeypatch.setattr(compile_cache, "LIST_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(compile_cache, "READ_TIMEOUT_SECONDS", 0.5)
    store.fail(fault, operation, count=None)
    began = time.monotonic()
    other = programs_of_another_machine()
    assert [get(other, "a-cache") for _ in range(50)] == [None] * 50
    assert time.monotonic() - began < 20  # a time limit for each would take 25 s
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        f"warning: cannot read compiled programs from {FOLDER}, compiling them again: "
    )


@pytest.mark.parametrize("fault", [503, "hang"])
def test_a_store_that_cannot_be_written_costs_one_warning_and_is_tried_again(
    store, fault, monkeypatch, capfd
):
    monkeypatch.setattr(compile_cache, "WRITE_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(compile_cache, "RETRY_SECONDS", 0.1)
    store.fail(fault, "write", count=None)
    programs = compile_cache._RemoteCache(FOLDER)
    began = time.monotonic()
    programs.write("a-cache", b"a")
    programs.write("b-cache", b"b")
    programs.finish()  # does not wait for a store that fails
    assert time.monotonic() - began < 30
    assert get(programs, "a-cache") == b"a"
    monkeypatch.setattr(compile_cache, "WRITE_TIMEOUT_SECONDS", 60)  # a busy machine is slow
    store.mend()
    while len(store.objects()) < 2 and time.monotonic() - began < 120:
        time.sleep(0.01)
    assert get(programs_of_another_machine(), "b-cache") == b"b"
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: cannot write compiled programs to {FOLDER} now: ")


def compile_on_a_machine(store, folder, **limits):
    """A process that compiles two programs: {hits, misses, result} of JAX's cache, and its stderr."""
    code = f"""
        import json, sys
        sys.path.insert(0, {str(ROOT)!r})
        from MaxNano import pyconfig
        from MaxNano.distributed import compile_cache, runtime
        vars(compile_cache).update(json.loads(sys.argv[1]))
        runtime.initialize(pyconfig.initialize([str(pyconfig.BASE), "base_output_directory=gs://ours/runs"]))
        import jax, jax.numpy as jnp
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        events = []
        jax.monitoring.register_event_listener(lambda name, **_: events.append(name.split("/")[-1]))
        square = jax.jit(lambda x: x @ x + 1)
        result = float(square(jnp.full((4, 4), 0.5)).sum())
        jax.clear_caches()
        result += float(square(jnp.full((4, 4), 0.5)).sum())
        compile_cache.finish()
        # On a GPU this cache of XLA's would put its folder into the key.
        assert jax.config.jax_persistent_cache_enable_xla_caches == "none"
        print(json.dumps([events.count("cache_hits"), events.count("cache_misses"), result]))
    """
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), json.dumps(limits)],
        env={**os.environ, **store.env, "HOME": str(folder)},
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not any(folder.iterdir()), "nothing is kept on the machine"
    return json.loads(done.stdout), done.stderr


def test_jax_compiles_nothing_that_another_machine_compiled(store, tmp_path):
    (hits, misses, first), err = compile_on_a_machine(store, tmp_path / "first")
    assert misses > 0 and hits == misses, "the second time in one process"
    assert len(store.objects("runs/.jax_cache/")) == misses and "warning" not in err
    (hits, none, second), err = compile_on_a_machine(store, tmp_path / "second")
    assert (hits, none) == (2 * misses, 0) and second == first and "warning" not in err


def test_jax_compiles_where_the_store_hangs(store, tmp_path):
    store.fail("hang", count=None)
    began = time.monotonic()
    limits = {"LIST_TIMEOUT_SECONDS": 0.5, "WRITE_TIMEOUT_SECONDS": 0.5}
    (_, misses, result), err = compile_on_a_machine(store, tmp_path / "machine", **limits)
    assert misses > 0 and result == 64.0
    assert time.monotonic() - began < 200
    assert err.count("compiled programs") == 2 and "Traceback" not in err


def test_no_folder_of_this_machine_is_in_a_cache_key(tmp_path):
    """A Pallas kernel for TPUs is a text within the program, which JAX does not clear of file
    names.
    """
    code = """
        import base64, re, sys
        sys.path.insert(0, sys.argv[1])
        from MaxNano import pyconfig
        from MaxNano.distributed import runtime
        runtime.initialize(pyconfig.initialize([str(pyconfig.BASE), f"jax_cache_dir={sys.argv[2]}"]))
        import jax
        from jax.experimental import pallas

        def kernel(x, y):
            y[...] = x[...] + 1

        add = jax.jit(lambda x: pallas.pallas_call(kernel, out_shape=x)(x))
        program = add.trace(jax.ShapeDtypeStruct((8, 128), "float32")).lower(lowering_platforms=("tpu",))
        body = re.search("body[^:]*:[^:]*22([A-Za-z0-9+/=]{100,})", str(program.compiler_ir("stablehlo")))[1]
        kernel = base64.b64decode(body)
        assert b"memory_space" in kernel  # names would be readable
        print(*{name.decode() for name in re.findall(rb"[ -~]+[.]py", kernel)})
    """
    script = tmp_path / "user" / "script.py"
    script.parent.mkdir()
    script.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, script, ROOT, tmp_path / "cache"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in (["user/script.py"], [])  # JAX 0.12 leaves names out
