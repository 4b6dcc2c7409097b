"""``recbole-llm clean`` removes what nobody needs, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recbole_llm import cli, lock
from recbole_llm.config.schema import known_keys
from recbole_llm.errors import UserError
from recbole_llm.quick_start import compare
from recbole_llm.results.clean import find_orphans, remove, size_of


@pytest.fixture(scope="module")
def dead_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def saved(tmp_path, dead_process) -> Path:
    """A folder of checkpoints in which runs were killed."""
    folder = tmp_path / "saved"
    states = folder / "states"
    for place in ("run/resume", "killed/resume", "deep/foundation", "states"):
        (folder / place).mkdir(parents=True)
    record = {"format": 1, "model": "ST2SI", "kind": "llm", "dataset": "chain", "finished": True}
    record["stored_files"] = [str(states / f"chain-items-{'a' * 16}.npy")]
    (folder / "run" / "recbole_llm.json").write_text(json.dumps(record))
    (folder / "run" / "model.safetensors").write_text("weights")
    (folder / "run" / "resume" / "state.json").write_text("{}")
    (folder / "killed" / "resume" / "state-3.safetensors").write_text("state")
    (folder / "run" / f"model.safetensors.{dead_process}.tmp").write_text("half")
    (folder / f"SASRec-chain-seed1.{dead_process}.pth").write_text("half of a stock model")
    (folder / f"GRU4Rec-chain-seed1.{os.getpid()}.pth").write_text("being written")
    (folder / "deep" / "foundation" / "merged.x8_1abcd.part").mkdir()
    (folder / "deep" / "foundation" / "merged.x8_1abcd.part" / "new").write_text("half an LLM")
    (folder / "SASRec-Nov-24-2025_12-00-00.pth").write_text("RecBole's own checkpoint")
    (folder / "notes.tmp").write_text("somebody's")
    for letter in "ab":
        (states / f"chain-items-{letter * 16}.npy").write_text("states")
    return folder


def found(folder: Path, **settings) -> dict[str, str]:
    return {str(entry.path.relative_to(folder)): entry.kind for entry in find_orphans(folder, **settings)}


def test_orphans_are_found(saved, dead_process):
    expected = {
        f"run/model.safetensors.{dead_process}.tmp": "temporary",
        f"SASRec-chain-seed1.{dead_process}.pth": "temporary",
        "deep/foundation/merged.x8_1abcd.part": "temporary",
        "run/resume": "finished",
        f"states/chain-items-{'b' * 16}.npy": "stored",
    }
    assert found(saved) == expected
    assert found(saved, unfinished=True) == {**expected, "killed/resume": "unfinished"}


def test_orphans_are_removed_and_nothing_else(saved):
    before = {path for path in saved.rglob("*") if path.is_file()}
    orphans = find_orphans(saved, unfinished=True)
    assert remove(orphans) == orphans
    gone = {path for path in before if any(path.is_relative_to(entry.path) for entry in orphans)}
    assert {path for path in saved.rglob("*") if path.is_file()} == before - gone
    assert not (saved / "killed").exists() and not list(saved.rglob(lock.LOCKS))
    assert find_orphans(saved, unfinished=True) == []


def test_nothing_of_a_held_folder_is_touched(saved):
    orphans = find_orphans(saved, unfinished=True)
    with lock.held(saved / "run"):
        (saved / "run" / "half.x8_1abcd.part").mkdir()  # what was there before went when the folder was taken
        shown = found(saved, unfinished=True)
        assert not [path for path in shown if path.startswith(("run", ".locks"))]
        assert "stored" not in shown.values()  # the run may read what no record names yet
        with lock.held(saved / "deep" / "foundation"):
            assert found(saved) == {path: kind for path, kind in found(saved).items() if not path.startswith("deep")}
    with lock.held(saved / "killed"):
        (saved / "killed" / ".here").touch()
    _hold_elsewhere(saved / "killed", lambda: [entry.path.name for entry in remove(orphans) if "killed" in str(entry.path)])
    _hold_elsewhere(saved / "killed", lambda: ["forgotten"] if lock.forget(saved / "killed") else [])
    assert (saved / "killed" / "resume" / "state-3.safetensors").exists()


def _hold_elsewhere(folder: Path, then) -> None:
    """Call ``then`` while another process holds ``folder``; it must find nothing to remove there."""
    code = f"from recbole_llm.lock import held\nwith held({str(folder)!r}):\n    print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        try:
            assert then() == []
        finally:
            process.stdin.write("\n")
            process.stdin.close()


def test_locks_that_nobody_holds(tmp_path):
    with lock.held(tmp_path / "held"):
        with lock.held(tmp_path / "left"):
            pass
        (tmp_path / lock.LOCKS / "dead.json").write_text("{}")
        orphans = find_orphans(tmp_path)
        assert [entry.path.name for entry in orphans] == ["dead.json", "left.lock"]
        remove(orphans)
        assert sorted(path.name for path in (tmp_path / lock.LOCKS).iterdir()) == ["held.json", "held.lock"]
        assert not lock.forget(tmp_path / "held")
    assert lock.forget(tmp_path / "held") and not (tmp_path / lock.LOCKS).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "settings", "stored"),
    [("ST2SI", {"tuning": "ilp"}, "states/chain-*.npy"), ("ALLMRec", {"alignment_epochs": 1}, "alignment-*.safetensors")],
)
def test_what_a_run_reads_stays_until_the_run_goes(tiny_settings, tmp_path, model, settings, stored):
    given = {key: value for key, value in tiny_settings.items() if key in known_keys(model)}
    given |= {"epochs": 1, "eval_step": 1.0, "eval_args": {"mode": "full"}, "topk": [5], **settings}
    if model == "ST2SI":
        given |= {"metrics": ["NDCG"], "valid_metric": "NDCG@5"}
    rows = compare([model], "chain", settings=given)
    folder = tmp_path / "saved"
    files = {str(file.relative_to(folder)) for file in folder.glob(stored)}
    assert files and "stored" not in found(folder).values()
    shutil.rmtree(rows[0]["checkpoint"])
    assert {path for path, kind in found(folder).items() if kind == "stored"} == files


def test_a_record_that_cannot_be_read_keeps_what_is_stored(saved):
    (saved / "run" / "recbole_llm.json").write_text("{")
    assert "stored" not in found(saved).values()


def test_records_of_before_keep_what_their_data_set_has(saved):
    record = {"format": 1, "model": "ST2SI", "kind": "llm", "dataset": "chain"}
    (saved / "run" / "recbole_llm.json").write_text(json.dumps(record))
    (saved / "states" / f"other-items-{'c' * 16}.npy").write_text("states")
    assert [path for path, kind in found(saved).items() if kind == "stored"] == [f"states/other-items-{'c' * 16}.npy"]


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path, dead_process):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / f"run.{dead_process}.tmp").symlink_to(tmp_path / "kept")
    (tmp_path / "saved" / "inner").symlink_to(tmp_path / "kept")
    orphans = find_orphans(tmp_path / "saved")
    assert len(remove(orphans)) == 1 and (tmp_path / "kept" / "file").read_text() == "mine"


def test_command(saved, capsys, dead_process):
    (saved / f"\x1b[31mred.{dead_process}.tmp").write_text("x" * 2500)
    assert cli.main(["clean", f"--checkpoint_dir={saved}"]) == 0
    shown = capsys.readouterr().out
    assert "2.5 kB" in shown and "\x1b" not in shown and "6 in all" in shown and "nothing was removed" in shown
    assert len(find_orphans(saved)) == 6
    assert cli.main(["clean", f"--checkpoint_dir={saved}", "--unfinished", "--yes"]) == 0
    assert "7 in all" in capsys.readouterr().out and find_orphans(saved, unfinished=True) == []
    assert cli.main(["clean", f"--checkpoint_dir={saved}", "--yes"]) == 0
    assert capsys.readouterr().out == "Nothing to clean.\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--checkpoint_dir=nowhere"], "checkpoint_dir: there is no folder nowhere"),
        (["--yes=perhaps"], "--yes is 'perhaps': give True or False"),
        (["--all=True"], "unknown key --all"),
    ],
)
def test_mistakes(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    assert cli.main(["clean", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_sizes_of_orphans(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(b"x" * 1000)
    (tmp_path / "a" / "b" / "two").write_bytes(b"x" * 500)
    assert size_of(tmp_path / "a") == 1500 and size_of(tmp_path / "a" / "one") == 1000 and size_of(tmp_path / "c") == 0


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        find_orphans(tmp_path / "saved")
