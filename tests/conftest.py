"""What all tests share: the CPU backend; hypothesis draws the same examples every time and never fails for slowness."""

import os

import hypothesis
import pytest

os.environ.setdefault(
    "JAX_PLATFORMS", "cpu"
)  # libtpu is there to compile with; programs run here too

from MaxNano.distributed import runtime  # noqa: E402

runtime.tile_small_products()  # as every program does
hypothesis.settings.register_profile("maxnano", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("maxnano")


@pytest.fixture(scope="module")
def served():
    """An object store in a process of its own; object_store.use lets the clients of a test speak to it."""
    import object_store

    with object_store.serve() as store:
        yield store
