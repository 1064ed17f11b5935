"""What all tests share: the CPU backend, fast compilation, one example sequence for hypothesis."""

import gc
import importlib.metadata
import os
import shutil
import signal
import tempfile

import hypothesis
import pytest

# Under nohup programs ignore it, and the tests send it to programs that they start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# libtpu is installed to compile with; programs run on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile for minutes and run for seconds, so LLVM does little, and fusions are emitted
# without MLIR, whose passes take three quarters of the time at this level. Programs that tests start
# inherit these flags.
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones end at an unknown flag
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
# Operations without the stack that made them, which costs a twentieth of tracing and lowering.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# The compilation cache of the programs that tests start, shared by all workers of one session.
os.environ.setdefault("MAXNANO_TEST_CACHE", tempfile.mkdtemp(prefix="maxnano_test_cache_"))

import MaxNano  # noqa: E402
from MaxNano.distributed import runtime  # noqa: E402

runtime.tile_small_products()  # as every program does
hypothesis.settings.register_profile("maxnano", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("maxnano")


# The files that take longest, in this order. Each file runs in one worker of tests/run.sh, so that
# its fixtures are made once; these start first, so that no worker is left alone with one of them.
LONGEST = (
    "end_to_end train multihost engine change_one_thing attention train_step compare cloud model"
    " evaluate hub evals_chat train_compile sft rl pyconfig metrics storage checkpointing stress"
    " core flash report chat loader serve"
).split()


def pytest_collection_modifyitems(items):
    """Sorts the tests by LONGEST; those of other files follow as they are."""
    position = {f"test_{name}.py": index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: position.get(item.path.name, len(LONGEST)))


def pytest_collection_finish():
    """Garbage collections are as rare as in programs, and leave out what collecting the tests made."""
    gc.set_threshold(*MaxNano.GC_THRESHOLDS)
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    """Removes the compilation cache when the session ends, not when one of its workers does."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["MAXNANO_TEST_CACHE"], ignore_errors=True)


@pytest.fixture(scope="module")
def compiled_once():
    """For modules whose tests compile the same programs again: JAX keeps what it has compiled."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def use(settings):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it looks at the settings once

    values = {
        "jax_compilation_cache_dir": os.environ["MAXNANO_TEST_CACHE"],
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in values}
    use(values)
    yield
    use(before)


@pytest.fixture(scope="module")
def served():
    """An object store in a separate process; object_store.use points the clients of a test to it."""
    import object_store

    with object_store.serve() as store:
        yield store
