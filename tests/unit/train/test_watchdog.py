"""A step that hangs ends the process, with the stacks of its threads on the disk."""

import faulthandler
import queue
import time

from mlt.train.watchdog import Watchdog


def test_a_hang_ends_the_process_and_shows_where(tmp_path):
    told, ended = queue.Queue(), queue.Queue()
    path = tmp_path / "logs" / "stacks-0.txt"
    with Watchdog(1.0, path, tell=lambda code, reason: told.put(code), end=ended.put) as watchdog:
        watchdog.progress("step 7")
        verdict = ended.get(timeout=20)
    assert told.get(timeout=5) == 70
    assert verdict.code == 70
    assert "no progress for 1 s in step 7" in verdict.text
    assert "test_a_hang_ends_the_process_and_shows_where" in path.read_text()


def test_the_last_resort_is_called_off_with_the_watch(tmp_path, monkeypatch):
    calls, ended = [], queue.Queue()
    for name in ("dump_traceback_later", "cancel_dump_traceback_later"):
        monkeypatch.setattr(faulthandler, name, lambda *_, name=name, **__: calls.append(name))
    with Watchdog(0.2, tmp_path / "stacks-0.txt", tell=lambda code, reason: None, end=ended.put):
        ended.get(timeout=20)
    assert "dump_traceback_later" in calls
    assert calls[-1] == "cancel_dump_traceback_later"  # else it would end this process two minutes from now


def test_progress_keeps_it_quiet_and_leaves_nothing(tmp_path):
    ended = queue.Queue()
    path = tmp_path / "stacks-0.txt"
    with Watchdog(1.0, path, tell=lambda code, reason: None, end=ended.put) as watchdog:
        for step in range(15):
            watchdog.progress(f"step {step}")
            time.sleep(0.1)
    assert ended.empty()
    assert not path.exists()


def test_where_no_file_can_be_made_the_stacks_go_to_the_screen(tmp_path, capfd):
    (tmp_path / "logs").write_text("no directory")
    ended = queue.Queue()
    with Watchdog(1.0, tmp_path / "logs" / "stacks-0.txt", tell=lambda code, reason: None, end=ended.put) as watchdog:
        watchdog.progress("the compilation of the train step")
        assert "the compilation of the train step" in ended.get(timeout=20).text
    assert "test_where_no_file_can_be_made" in capfd.readouterr().err
