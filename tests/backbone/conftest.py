"""A stand-in for PyPI: wheels like the pinned ones, with small models inside."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from recbole_llm.backbone import fetch
from recbole_llm.backbone.fetch import Wheel


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def publish(tmp_path, monkeypatch) -> Callable[..., Wheel]:
    """A function (pinned wheel, write, names) -> one like it that holds what ``write(folder)`` writes.

    ``names`` are the files of it that are used, None: all. The cache folder is empty, and pip, which must be asked in
    the safe way, gives the wheel ``published.whl``.
    """
    path = tmp_path / "published.whl"
    monkeypatch.setenv("RECBOLE_LLM_CACHE", str(tmp_path / "cache"))

    def make(pinned: Wheel, write: Callable[[Path], None], names: Iterable[str] | None = None) -> Wheel:
        package = tmp_path / "wheel" / "some_package"
        content = package / pinned.inside
        content.mkdir(parents=True)
        write(content)
        used = names or [file.relative_to(content).as_posix() for file in content.rglob("*") if file.is_file()]
        (package / "__init__.py").write_text("raise ImportError('it needs what we do not have')")
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(package.rglob("*")):
                archive.write(file, file.relative_to(package.parent))
        return dataclasses.replace(
            pinned,
            requirement="some-package==1",
            package="some_package",
            file="some_package-1.whl",
            sha256=sha256(path),
            files={name: sha256(content / name) for name in used},
        )

    def run(command, **options):
        assert "--no-deps" in command and "--only-binary=:all:" in command and command[-1] == "some-package==1"
        shutil.copy(path, Path(command[command.index("--dest") + 1]) / "some_package-1.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return make
