"""Data sets that RecBole knows the addresses of (``properties/dataset/url.yaml``), fetched whole or not at all.

RecBole's own download leaves a half-filled folder where the connection breaks off, and waits for other processes that a run
here does not have.
"""

from __future__ import annotations

import shutil
import zipfile
from logging import getLogger
from pathlib import Path, PurePosixPath

from recbole_llm import registry
from recbole_llm.config.schema import load_yaml
from recbole_llm.data.prepare.download import download
from recbole_llm.errors import UserError
from recbole_llm.files import written_folder


def address_of(dataset: str) -> str | None:
    """Where RecBole has a data set; None of one that it does not know."""
    return load_yaml(registry.recbole_folder() / "properties" / "dataset" / "url.yaml").get(dataset)


def fetch(dataset: str, folder: Path) -> None:
    """Download the archive of a data set and unpack its atomic files to ``folder``, under the data set's name.

    Args:
        dataset: one that :func:`address_of` knows.
        folder: appears once it is complete.

    Raises:
        UserError: the archive cannot be fetched, or is none of a data set.
    """
    address = str(address_of(dataset))
    archive = folder.with_name(f"{dataset}.zip")
    getLogger().info(f"Fetching {dataset} from {address}")
    if not archive.exists():
        download(address, archive)
    with written_folder(folder) as new:
        new.mkdir()
        _unpack(archive, new, dataset, PurePosixPath(address).stem)
    archive.unlink()


def _unpack(archive: Path, folder: Path, dataset: str, published: str) -> None:
    """The files of an archive, whatever folder of it they are in; ``published`` in their names becomes ``dataset``."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                name = PurePosixPath(member.filename.replace("\\", "/")).name
                if member.is_dir() or not name or name in (".", ".."):
                    continue
                with opened.open(member) as source, open(folder / name.replace(published, dataset), "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # also of a packing or a password
        raise UserError(f"{archive} is no whole zip file ({error}): remove it and run the command again.") from None
    if not (folder / f"{dataset}.inter").is_file():
        raise UserError(f"{archive} holds no {dataset}.inter: it is no data set of RecBole's; remove it.")
