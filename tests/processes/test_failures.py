"""A process that is killed, hangs or fails: a sentence of one of the others, an exit code, a state to go on from."""

from __future__ import annotations

import re
import time

import pytest
from test_processes import Runs, assert_same, job, run_all
from torch.distributed import HashStore

from recbole_llm.processes.watch import PeerError, Watch

LONG = {"epochs": 8, "eval_step": 0.5, "process_timeout": 8, "lora_dropout": 0}
STATE = "saved/TALLRec-*/resume/state.json"
CASES = [
    (2, 1, "SIGKILL"), (2, 0, "SIGKILL"), (2, 1, "SIGSTOP"), (2, 1, "SIGTERM"), (4, 2, "SIGKILL"), (4, 0, "SIGSTOP"),
]  # fmt: skip


@pytest.fixture
def two_watches():
    store = HashStore()
    watches = [Watch(store, rank, 2, 2.0) for rank in range(2)]
    for watch in watches:
        watch.look()
    yield watches
    for watch in watches:
        watch._stopped.set()


def test_one_that_does_not_come(two_watches):
    first, second = two_watches
    second.arrive()
    meeting = first.arrive() and first.arrive()
    second.look(), first.look()
    first.check(meeting, time.monotonic())
    with pytest.raises(PeerError, match=r"process 1 \(pid \d+ on .*\) did not come for 2 s to where the others wait"):
        first.check(meeting, time.monotonic() - 3)
    first.check(meeting, time.monotonic() - 3, patient=True)
    second.arrive(), second.look(), first.look()
    first.check(meeting, time.monotonic() - 3)


def test_one_that_gives_no_sign_of_life(two_watches):
    first, second = two_watches
    second._stopped.set()
    second._thread.join()
    first.peers[1].seen -= 3
    with pytest.raises(PeerError, match="process 1 .* has given no sign of life for 2 s: .* --resume=True"):
        first.check(1, time.monotonic(), patient=True)
    assert first.speaks() and list(first.lost()) == [1]


def test_one_that_froze_on_its_way_is_silent_and_not_late(two_watches):
    first, second = two_watches
    second._stopped.set()
    second._thread.join()
    first.look()
    meeting = first.arrive()
    first.peers[1].seen = time.monotonic() - 1.5
    first.check(meeting, time.monotonic() - 2.1)
    first.peers[1].seen -= 1
    with pytest.raises(PeerError, match="process 1 .* has given no sign of life for 2 s"):
        first.check(meeting, time.monotonic() - 3.1)


def test_one_that_ended_without_a_word(two_watches):
    first, second = two_watches
    second._own["pid"] = 2**22 + 1  # no process has so high a number
    second.look(), first.look()
    with pytest.raises(PeerError, match="ended without a word"):
        first.check(1, time.monotonic())
    second._own["ended"] = True
    second.look(), first.look()
    first.check(1, time.monotonic())


def test_a_mistake_of_one_ends_who_waits_for_it(two_watches):
    first, second = two_watches
    second.fail("data_path: there is no folder 'x'.", 2)
    first.look()
    with pytest.raises(PeerError, match="process 1: data_path: there is no folder") as raised:
        first.check(first.arrive(), time.monotonic())
    assert raised.value.code == 2
    assert first.all_failed(1) is True and second.all_failed(1) is None
    first.fail("the same", 2)
    second.look()
    assert second.all_failed(1) is True


@pytest.fixture(scope="module")
def lost_and_found(chain_data, tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("lost")
    jobs = {"whole": job("TALLRec", chain_data, folder / "whole", **LONG)}
    for processes, disturbed, by in CASES:
        name, place = f"{processes}-{disturbed}-{by}", folder / f"{processes}-{disturbed}-{by}"
        jobs[name] = job("TALLRec", chain_data, place, processes, disturbed=disturbed, by=by, once=STATE, **LONG)
        jobs[f"{name} rest"] = job("TALLRec", chain_data, place, 1 if processes == 2 else 2, resume=True, **LONG)
    jobs["mistake"] = job("TALLRec", chain_data, folder / "mistake", 2, words_of={"1": ["--seed=3"]}, **LONG)
    return run_all(jobs, folder, 3000)


@pytest.mark.slow
def test_a_mistake_of_one_is_told_by_the_main_process(lost_and_found):
    ended, _ = lost_and_found["mistake"]
    assert ended.codes == [2, 2]
    assert "Error: process 1: the name that settings and data give the run's folder of process 1 is" in ended.errors[0]
    assert ended.errors[1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_process_is_lost(case, lost_and_found):
    """The table of ``docs/several-processes.md``: who speaks, and that the rest gives what an undisturbed run gives."""
    (processes, disturbed, by), name = case, "-".join(map(str, case))
    (ended, folder), (resumed, _), (undisturbed, whole) = (lost_and_found[key] for key in (name, f"{name} rest", "whole"))
    speaker = 0 if disturbed else 1
    told = ended.errors[speaker].splitlines()[-1:]
    print(f"{processes} processes, process {disturbed} by {by}: {ended.seconds:.1f} s, {told}")
    others = [code for rank, code in enumerate(ended.codes) if rank != disturbed]
    sentences = [line for text in ended.errors for line in text.splitlines() if line.startswith(("Error", "Interrupted"))]
    assert len(sentences) == 1 and sentences[0] in ended.errors[speaker] and "Traceback" not in "".join(ended.errors)
    if by == "SIGTERM":  # it says so itself
        assert set(ended.codes) == {2} and "process 1: Interrupted" in sentences[0]
    else:
        assert set(others) == {1}, ended.codes
        what = "ended without a word" if by == "SIGKILL" else "has given no sign of life for 8 s"
        assert re.search(rf"process {disturbed} \(pid \d+ on .*\) {what}: .* --resume=True goes on", sentences[0])
    assert set(resumed.codes) == {0} and "resuming the training" in resumed.errors[0], resumed.errors
    assert set(undisturbed.codes) == {0}
    assert not [path for path in (folder / "saved").rglob("*") if path.suffix in (".tmp", ".part") or path.name == "resume"]
    assert_same(whole, folder)
