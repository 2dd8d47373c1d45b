"""A run's lock, between real processes: one holds it, and it goes with that one, however it ends."""

import os
import signal
import socket
import time

import pytest

from syncbn.trainer.errors import UserError
from syncbn.trainer.runs import lock
from tests.trainer.another_process import another, kill


def holding(folder, for_s=60.0):
    def job(tell):
        with lock.held(folder, longest_s=0):
            tell("held")
            time.sleep(for_s)

    return another(job)


def test_another_is_refused_and_told_who_holds_it(tmp_path):
    with holding(tmp_path / "r") as (pid, listen):
        listen()
        held = lock.holder(tmp_path / "r")
        assert (held.host, held.pid) == (socket.gethostname(), pid)
        began = time.monotonic()
        with pytest.raises(UserError) as refused, lock.held(tmp_path / "r", longest_s=0.5):
            pass
        assert 0.5 <= time.monotonic() - began < 5
    assert str(refused.value) == (
        f"{tmp_path}/r is in use by a job on host {held.host}, pid {pid}, since {held.since}: one job at a time writes "
        "to a run; let that one end, or choose another run.name="
    )


def test_a_killed_process_leaves_nothing_locked(tmp_path):
    with holding(tmp_path / "r") as (pid, listen):
        listen()
        kill(pid)
        assert (tmp_path / "r" / lock.NAME).exists()
        assert lock.holder(tmp_path / "r") is None
        with lock.held(tmp_path / "r", longest_s=0):
            pass


def test_the_file_is_gone_before_the_lock_is_given_back(tmp_path, monkeypatch):
    """Else it could be another's that is removed."""
    file, there, close = tmp_path / "r" / lock.NAME, [], os.close
    monkeypatch.setattr(os, "close", lambda handle: (there.append(file.exists()), close(handle)))
    with lock.held(tmp_path / "r", longest_s=0):
        there.clear()
    assert there == [False]


def test_what_the_holder_has_forked_does_not_hold_it_after_its_death(tmp_path):
    def job(tell):
        with lock.held(tmp_path / "r", longest_s=0):
            if (child := os.fork()) == 0:
                time.sleep(60)
                os._exit(0)
            tell(child)
            time.sleep(60)

    with another(job) as (pid, listen):
        orphan = int(listen())
        kill(pid)
        try:
            with lock.held(tmp_path / "r", longest_s=0):
                os.kill(orphan, 0)  # it lives
        finally:
            os.kill(orphan, signal.SIGKILL)


def test_the_holders_children_may_end_and_look_and_it_holds_on(tmp_path):
    def job(tell):
        with lock.held(tmp_path / "r", longest_s=0):
            if (child := os.fork()) == 0:
                os.closerange(3, 100)
                os._exit(0)
            os.waitpid(child, 0)
            tell("ended")
            time.sleep(60)

    with another(job) as (pid, listen):
        listen()
        assert lock.holder(tmp_path / "r").pid == pid
        with pytest.raises(UserError), lock.held(tmp_path / "r", longest_s=0):
            pass


def test_it_is_waited_for_and_had_when_the_other_ends(tmp_path, capsys):
    with holding(tmp_path / "r", for_s=1.5) as (pid, listen):
        listen()
        with lock.held(tmp_path / "r", longest_s=30):
            assert (tmp_path / "r" / lock.NAME).exists()  # its own: the other has removed the one that it had
            with another(lambda tell: tell(lock.holder(tmp_path / "r").pid)) as (_, seen):
                assert int(seen()) == os.getpid()
    assert f"r is in use by a job on host {socket.gethostname()}, pid {pid}" in capsys.readouterr().err


def test_a_file_that_the_last_holder_has_removed_is_no_lock(tmp_path):
    """Nor for a process that has opened it before, and is slow."""
    opened = lock._opened

    def slowly(folder):
        handle = opened(folder)
        time.sleep(1.5)
        return handle

    def late(tell):
        lock._opened = slowly
        with lock.held(tmp_path / "r", longest_s=60):
            tell("held")
            time.sleep(60)

    with holding(tmp_path / "r", for_s=1) as (_, listen):
        listen()
        with another(late) as (pid, got):
            got()
            assert lock.holder(tmp_path / "r").pid == pid


def test_many_that_come_and_go_have_it_one_at_a_time(tmp_path):
    """Each removes the file as it leaves, and the next to come may hold the one that is no longer there."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def job(tell):
        for _ in range(15):
            with lock.held(tmp_path / "r", longest_s=60):
                number = int(counter.read_text())
                time.sleep(0.002)
                counter.write_text(str(number + 1))
        tell("done")

    with another(job) as first, another(job) as second, another(job) as third:
        assert [listen() for _, listen in (first, second, third)] == ["done\n"] * 3
    assert counter.read_text() == "45"
    assert not (tmp_path / "r").exists()


def test_a_folder_that_goes_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    """mkdir finds it there, another job takes it away, and then it is no folder: seen once in a loaded test run."""
    is_dir, gone = type(tmp_path).is_dir, []

    def taken_away(path):
        if path == tmp_path / "r" and not gone:
            gone.append(path)
            path.rmdir()
        return is_dir(path)

    (tmp_path / "r").mkdir()
    monkeypatch.setattr(type(tmp_path), "is_dir", taken_away)
    with lock.held(tmp_path / "r", longest_s=0):
        assert (tmp_path / "r" / lock.NAME).exists()
    assert gone


def test_a_folder_stays_if_it_has_something_in_it(tmp_path):
    with lock.held(tmp_path / "a", longest_s=0):
        pass
    assert not (tmp_path / "a").exists()
    with lock.held(tmp_path / "b", longest_s=0):
        (tmp_path / "b" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["config.yaml"]


def test_where_nothing_can_be_written_one_line_says_so(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"cannot be written to \(Not a directory\)"),
        lock.held(tmp_path / "file" / "r", 0),
    ):
        pass


def test_a_run_that_nobody_holds_has_no_holder(tmp_path):
    assert lock.holder(tmp_path / "nowhere") is None
    (tmp_path / lock.NAME).write_text("garbage")
    assert lock.holder(tmp_path) is None
    with lock.held(tmp_path, longest_s=0):
        pass


def test_the_file_of_a_killed_job_is_cleared_and_that_of_a_living_one_is_not(tmp_path):
    """Seen in a soak: a job killed behind its result left its lock's file in a finished run, for good."""
    with holding(tmp_path / "r") as (pid, listen):
        listen()
        lock.clear(tmp_path / "r")
        assert lock.holder(tmp_path / "r").pid == pid
        kill(pid)
        assert (tmp_path / "r" / lock.NAME).exists()
        lock.clear(tmp_path / "r")
        assert not (tmp_path / "r" / lock.NAME).exists()
    lock.clear(tmp_path / "nowhere")
