"""The identity of a checkpoint: its model, tokenizer, software and devices."""

import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, scaling
from MaxNano.storage.checkpoints import CheckpointError

# Packages whose version can change numbers.
PACKAGES = ("maxnano", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint")


def describe(config: FrozenConfigDict, tokenizer_fingerprint: str) -> dict[str, Any]:
    """The JSON-able identity that is saved with each checkpoint of this process."""
    return {
        "config": {key: config[key] for key in pyconfig.keys_of(config)},
        "tokenizer": tokenizer_fingerprint,
        "versions": _versions(),
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "host_cores": os.cpu_count(),
        },
    }


def check(
    saved: Mapping[str, Any], config: FrozenConfigDict, tokenizer_fingerprint: str, run: Any
) -> None:
    """Raises CheckpointError if a saved identity is of another model or tokenizer than this one.

    An architecture key that did not exist when the checkpoint was saved had the value in
    scaling.ARCHITECTURE_KEYS. Fingerprints "" are unknown and not compared.
    """
    try:
        architecture = scaling.architecture_of(saved["config"])
    except ValueError as error:
        raise CheckpointError(f"the checkpoint of {run} cannot be used: {error}") from None
    for key, value in architecture.items():
        if value != config[key]:
            raise CheckpointError(
                f"{key} is {value} in the checkpoint of {run} but {config[key]} now; set it back "
                "or choose another run_name"
            )
    tokenizer = saved["tokenizer"]
    if tokenizer and tokenizer_fingerprint and tokenizer != tokenizer_fingerprint:
        raise CheckpointError(
            f"the tokenizer of {run} has fingerprint {tokenizer[:16]} but tokenizer_path has "
            f"{tokenizer_fingerprint[:16]}; set it back or choose another run_name"
        )


@functools.cache
def _versions() -> dict[str, str | None]:
    """Versions of Python and the packages, the code's commit, and a fingerprint of its source files,
    which also sees what is not committed; None if unknown.
    """
    versions: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        result = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True)
        versions["commit"] = result.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        versions["commit"] = None
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    versions["source"] = digest.hexdigest()[:16]
    return versions
