"""A share of what tests/stress.py repeats: interruptions, damage and full disks lose nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def stress(folder, *words):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/stress.py"), str(folder), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_interruptions_and_damage_lose_nothing(tmp_path):
    table = stress(tmp_path, "--only", "pretraining/kill=1,damage=6")
    assert "| pretraining/kill | 1 | 1 | 0 | 0 |" in table
    assert "| damage | 6 | 0 | 6 | 0 |" in table


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_many_interruptions_damages_and_full_disks_lose_nothing(tmp_path):
    assert "LOST" not in stress(tmp_path)
