"""Builds the wheel: configs/ stands beside the package and is copied into it; pyproject.toml has the
rest.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies configs/ to MaxNano/configs/ in a wheel; an editable install reads configs/ itself."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for name in ("base.yml", "models", "stages"):  # not tuned/, which is of one machine
                source, target = (
                    Path("configs", name),
                    Path(self.build_lib, "MaxNano/configs", name),
                )
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, target, dirs_exist_ok=True)
                else:
                    shutil.copy(source, target)


setup(cmdclass={"build_py": BuildWithConfigs})
