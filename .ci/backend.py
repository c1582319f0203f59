# SPDX-License-Identifier: MIT
"""Build backend: setuptools, which installs femtoqueue.py as femtoqueue/__init__.py.

Type checkers believe the annotations of an installed library only where a `py.typed` lies beside them
(PEP 561), and a module of one file has no place for it. A package has. So the wheel holds

    femtoqueue/__init__.py   femtoqueue.py, byte for byte
    femtoqueue/__main__.py   for `python -m femtoqueue`
    femtoqueue/py.typed      empty

while the repository, the sdist and an editable install keep the one file.
"""

from __future__ import annotations

from pathlib import Path

from setuptools.build_meta import *  # noqa: F403
from setuptools.command.build_py import build_py

_ADDED = {"__main__.py": "from femtoqueue import _script\n\n_script()\n", "py.typed": ""}
_ALSO_IN_SDIST = (".ci/backend.py", "benchmark_mini.py", "test_femtoqueue.py")


class BuildPy(build_py):
    """Called by setuptools, as pyproject.toml says."""

    def get_module_outfile(self, build_dir: str, package: object, module: str) -> str:
        return str(Path(build_dir, module, "__init__.py"))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        added = [str(Path(self.build_lib, "femtoqueue", name)) for name in _ADDED]
        return super().get_outputs(include_bytecode) + added

    def get_source_files(self) -> list[str]:
        return super().get_source_files() + [name for name in _ALSO_IN_SDIST if Path(name).exists()]

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name, text in _ADDED.items():
                Path(self.build_lib, "femtoqueue", name).write_text(text, encoding="utf-8")
