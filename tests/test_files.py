"""Atomic writes of files and folders, and what a full disk leaves."""

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recbole_llm import checkpoint
from recbole_llm.backbone.stored_states import StoredStates
from recbole_llm.checkpoint import write_tensors
from recbole_llm.data.prepare import write_atomic
from recbole_llm.errors import FullDiskError, UserError
from recbole_llm.files import replace_file, reporting_full_disk, written_folder
from recbole_llm.results.files import write_json, write_per_user


@pytest.fixture
def group_may_read():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_weights_have_the_mode_of_any_new_file(tmp_path, group_may_read):
    write_tensors(tmp_path / "model.safetensors", {"w": torch.ones(2)})
    with written_folder(tmp_path / "merged") as made:
        made.mkdir(mode=0o700)
        save_file({"w": torch.ones(2)}, str(made / "model.safetensors"))
    assert mode(tmp_path / "model.safetensors") == mode(tmp_path / "merged" / "model.safetensors") == 0o640
    assert mode(tmp_path / "merged") == 0o750


def test_what_fails_leaves_the_old_one(tmp_path):
    file, folder = tmp_path / "model.safetensors", tmp_path / "merged"
    write_tensors(file, {"w": torch.ones(2)})
    with written_folder(folder) as made:
        made.mkdir()
        (made / "config.json").write_text("old")

    def write_half(temporary):
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(file, write_half)
    with pytest.raises(KeyboardInterrupt), written_folder(folder) as made:
        made.mkdir()
        write_half(made / "config.json")
    assert load_file(file)["w"].tolist() == [1.0, 1.0] and (folder / "config.json").read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [folder, file]


# --- full disks -------------------------------------------------------------------------------------------------------


def write_folder(folder, size):
    with written_folder(folder) as made:
        made.mkdir()
        save_file({"w": torch.ones(size)}, str(made / "model.safetensors"))


def save_as_recbole(file, size):
    with reporting_full_disk(file):
        try:
            torch.save({"w": torch.ones(size)}, file, pickle_protocol=4)
        finally:
            if size > 10:
                file.unlink()


def store_states(place, size):
    """As many prompts of one out token."""

    def build(part):
        return SimpleNamespace(tokens=part, offsets=part, out_positions=part, is_read=np.ones((len(part), 1), bool))

    StoredStates(place, b"", lambda prompts: torch.ones(len(prompts.tokens), 2), 2, build, size)


def row(size):
    users = [f"user {number}" for number in range(size)]
    return {
        "model": "A", "dataset": "d", "seed": 1, "metrics": {f"metric{number}@1": 0.5 for number in range(size)},
        "ranks": [1] * size, "user_ids": users, "users": size,
    }  # fmt: skip


# Each writes ``size`` numbers: few fit, 300,000 do not.
WRITERS = {
    "weights": lambda folder, size: write_tensors(folder / "model.safetensors", {"w": torch.ones(size)}),
    "record": lambda folder, size: checkpoint.write_json(folder / "recbole_llm.json", {"log": [1.5] * size}),
    "checkpoint": lambda folder, size: checkpoint.write(folder / "run", {"model": "A"}, {"w": torch.ones(size)}),
    "folder": lambda folder, size: write_folder(folder / "merged", size),
    "stock model": lambda folder, size: save_as_recbole(folder / "SASRec.pth", size),
    "results": lambda folder, size: write_json([row(size)], folder / "results.json"),
    "results by user": lambda folder, size: write_per_user([{**row(size), "metrics": {}}], folder / "users.tsv"),
    "stored states": lambda folder, size: store_states(folder / "states" / "chain", size),
    "data": lambda folder, size: write_atomic(folder / "a.inter", {"user_id:token": range(size)}),
}


def content(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def fill(folder):
    """Write each kind of file when there is room and again, much larger, when there is none; report both as JSON."""
    found = {}
    for name, write in WRITERS.items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        write(place, 4)
        before = content(place)
        try:
            write(place, 300_000)
            found[name] = "it was written"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        if name != "stock model" and content(place) != before:
            found[name] += f" BUT LEFT {sorted(content(place))}"
    print(json.dumps(found))


def check(found, folder):
    assert list(found) == list(WRITERS)
    for sentence in found.values():
        kind, _, text = sentence.partition(": ")
        assert kind in (FullDiskError.__name__, UserError.__name__), sentence
        assert str(folder) in text and "BUT LEFT" not in text and "\n" not in text, sentence


@pytest.mark.skipif(os.name == "nt", reason="POSIX's limit")
def test_a_file_size_limit_is_a_sentence_and_leaves_the_old_file(tmp_path):
    """In a process of its own, which may write files of at most 1 MB."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    code = f"import sys, pathlib; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_files; "
    code += f"test_files.fill(pathlib.Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout.splitlines()[-1]), tmp_path)


@pytest.mark.slow
def test_a_full_disk_is_a_sentence_and_leaves_the_old_file(tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if not done or done.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        fill(disk)
        check(json.loads(capsys.readouterr().out.splitlines()[-1]), disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
