"""Raw files: found in a folder, taken out of an archive, or downloaded, whole and checked."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from recbole_llm.data.prepare.source import RawFile
from recbole_llm.errors import UserError
from recbole_llm.files import replace_file

TIMEOUT = 20  # seconds without a byte
ATTEMPTS = 5
_CHUNK = 1 << 20


def obtain(files: Iterable[RawFile], folder: Path) -> dict[str, Path]:
    """Return ``RawFile.name`` -> path of each file, from ``folder``, or downloaded into it.

    A file that is not required and not there is left out, and nothing is downloaded for it.

    Raises:
        UserError: a file is neither there nor to be fetched, or its checksum is wrong; names the address and the place.
    """
    found = {}
    for file in files:
        path = find(file, folder)
        if path is None and file.required:
            path = _fetch(file, folder)
        elif path is not None and path.name == file.name and not file.archive:
            verify(path, file.checksum)
        if path is not None:
            found[file.name] = path
    return found


def find(file: RawFile, folder: Path) -> Path | None:
    """Return where a file is under ``folder``, packed or not, itself or in the folder that its archive unpacks to."""
    names = []
    for name in (file.name, *file.other_names):
        names += [name, name.removesuffix(".gz") if name.endswith(".gz") else name + ".gz"]
    folders = [folder] + ([folder / Path(file.archive).stem] if file.archive else [])
    candidates = [place / name for place in folders for name in names]
    return next((path for path in candidates if path.is_file()), None)


def _fetch(file: RawFile, folder: Path) -> Path:
    if not file.address:
        raise UserError(f"{folder / file.name} is not there, and only people can get it: see {file.page}, and put it there.")
    if not file.archive:
        return download(file.address, folder / file.name, file.checksum)
    archive = folder / file.archive
    if archive.is_file():
        verify(archive, file.checksum)
    else:
        download(file.address, archive, file.checksum)
    return _unpack(archive, file.name, folder / archive.stem / file.name)


def _unpack(archive: Path, name: str, target: Path) -> Path:
    """Take the member that is called ``name``, in whatever folder of the archive, to ``target``."""
    try:
        with zipfile.ZipFile(archive) as opened:
            member = next((entry for entry in opened.namelist() if entry.rpartition("/")[2] == name), None)
            if member is None:
                raise UserError(f"{archive} holds no {name}: it is another archive than the one expected.")
            target.parent.mkdir(parents=True, exist_ok=True)

            def write(path: Path) -> None:
                with opened.open(member) as source, open(path, "wb") as sink:
                    shutil.copyfileobj(source, sink, _CHUNK)

            replace_file(target, write)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive} is no whole zip file ({error}): remove it and run the command again.") from None
    return target


def download(address: str, target: Path, checksum: str = "") -> Path:
    """Download a file: what has come is kept in ``target.part`` and taken up again; ``target`` appears once it is whole.

    Args:
        address: http, https or file address.
        target: where the file goes.
        checksum: ``md5:...`` or ``sha256:...``; empty: only the length is checked.

    Raises:
        UserError: it cannot be fetched, or is not what was published.
    """
    by_hand = f"download it elsewhere and put it at {target}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target} is not there and cannot be written ({error.strerror}); it is at {address}.") from None
    part = target.with_name(target.name + ".part")
    problem = ""
    for _ in range(ATTEMPTS):
        before = _size(part)
        try:
            if _continue(address, part, target.name):
                break
            problem = f"the connection ended after {_size(part):,} bytes"
        except urllib.error.HTTPError as error:
            raise UserError(f"{address} cannot be fetched (HTTP {error.code}): {by_hand}.") from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        except PermissionError as error:
            raise UserError(f"{target} is not there and cannot be written ({error.strerror}); it is at {address}.") from None
        if _size(part) <= before:  # nothing came: another attempt would not differ
            raise UserError(f"{address} cannot be fetched ({problem}): {by_hand}.")
    else:
        raise UserError(f"{address} came in part only ({problem}): run the command again to go on, or {by_hand}.")
    try:
        verify(part, checksum, address)
    except UserError:
        part.unlink()
        _validator(part).unlink(missing_ok=True)
        raise
    os.replace(part, target)
    _validator(part).unlink(missing_ok=True)
    return target


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _validator(part: Path) -> Path:
    """Holds the server's name for the version of the file of which ``part`` is the beginning."""
    return part.with_name(part.name + ".version")


def _continue(address: str, part: Path, label: str) -> bool:
    """Fetch what ``part`` lacks; return whether it is whole."""
    start = _size(part)
    known = _validator(part).read_text() if start and _validator(part).is_file() else ""
    if not known:
        start = 0  # a beginning of an unknown version is no beginning
    request = urllib.request.Request(address, headers={"User-Agent": "recbole-llm"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", known)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        part.unlink()  # longer than the file: it is no beginning of it
        return False
    with response:
        resumed = getattr(response, "status", None) == 206
        length = response.headers.get("Content-Length")
        whole = (start if resumed else 0) + int(length) if length is not None else None
        version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if not resumed:
            part.unlink(missing_ok=True)
            _validator(part).unlink(missing_ok=True)
            if version and not version.startswith("W/"):
                _validator(part).write_text(version)
        shown = {"total": whole, "initial": start if resumed else 0, "unit": "B", "unit_scale": True, "desc": label}
        with open(part, "ab") as sink, tqdm(**shown, disable=None, leave=False) as bar:
            while True:
                try:
                    chunk = response.read(_CHUNK)
                except http.client.IncompleteRead as error:
                    chunk = error.partial
                    if not chunk:
                        break
                if not chunk:
                    break
                sink.write(chunk)
                bar.update(len(chunk))
    return whole is None or _size(part) == whole


def verify(path: Path, checksum: str, address: str = "") -> None:
    """Raise UserError where a file has not the published checksum."""
    if not checksum:
        return
    kind, _, expected = checksum.partition(":")
    actual = digest(path, kind)
    if actual != expected:
        what = f"what {address} gave" if address else str(path)
        raise UserError(f"{what} is not the file that was published: its {kind} is {actual}, not {expected}; get it again.")


def digest(path: Path, kind: str = "sha256") -> str:
    """The checksum of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
