"""A share of what tests/stress.py repeats: interruptions, damage and full disks lose nothing.

tests/test_train.py interrupts runs too.
"""

from pathlib import Path

import programs
import pytest

ROOT = Path(__file__).parents[1]


def stress(folder, *words):
    done = programs.run(ROOT / "tests/stress.py", folder, *words, timeout=None)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_damage_loses_nothing(tmp_path):
    table = stress(tmp_path, "--only", "damage=6")
    assert "| damage | 6 | 0 | 6 | 0 |" in table


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_many_interruptions_damages_and_full_disks_lose_nothing(tmp_path):
    assert "LOST" not in stress(tmp_path)
