"""Files and folders that are there whole or not at all."""

import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from recbole_llm.checkpoint import write_tensors
from recbole_llm.files import replace_file, written_folder


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
