"""Processes of a run as threads of this one: meeting, stopping together, losing one another."""

import concurrent.futures
import json
import queue
import socket
import time

import pytest

from mlt.errors import UserError
from mlt.train.peers import Peers
from mlt.train.processes import Processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Meeting:
    """What a test's processes have in common; their ends land in `ended`."""

    def __init__(self):
        self.port, self.ended = free_port(), queue.Queue()
        self.pool = concurrent.futures.ThreadPoolExecutor(8)

    def join(self, index, count=3, seconds=20.0, silence=20.0, **facts):
        processes = Processes("127.0.0.1", self.port, count, index)
        end = self.ended.put
        return self.pool.submit(Peers, processes, facts, start_seconds=seconds, silence_seconds=silence, end=end)

    def stranger(self, count=2):
        """A connection that says it is process 1, as one that hangs or dies afterwards would."""
        end = time.monotonic() + 10
        while True:
            try:
                link = socket.create_connection(("127.0.0.1", self.port))
                break
            except ConnectionRefusedError:
                assert time.monotonic() < end
                time.sleep(0.02)
        link.sendall(json.dumps({"process": 1, "count": count, "host": "elsewhere"}).encode() + b"\n")
        return link


@pytest.fixture
def meeting():
    meeting = Meeting()
    yield meeting
    meeting.pool.shutdown(cancel_futures=True)


def refusals(futures) -> list[str]:
    texts = []
    for future in futures:
        with pytest.raises(UserError) as refused:
            future.result(timeout=30)
        texts.append(str(refused.value))
    return texts


def test_all_stop_after_the_same_step(meeting):
    futures = [meeting.join(index) for index in (2, 1, 0)]
    peers = [future.result(timeout=30) for future in futures]
    assert [len(one.hosts) for one in peers] == [3, 3, 3]

    def run(one: Peers) -> tuple[int, str]:
        """Steps at a pace of its own, at most two ahead of the slowest as collectives would allow."""
        for step in range(1, 200):
            time.sleep(0.001 * (1 + one.index))
            progress[one.index] = step
            while step > min(progress.values()) + 2:
                time.sleep(0.0005)
            name = one.stop_after(step, "SIGTERM" if one.index == 2 and step >= 20 else None)
            if name is not None:
                progress[one.index] = 1000
                return step, name
        raise AssertionError("nobody was stopped")

    progress = {0: 0, 1: 0, 2: 0}
    stops = [meeting.pool.submit(run, one) for one in peers]
    found = {future.result(timeout=30) for future in stops}
    assert len(found) == 1, found
    step, name = found.pop()
    assert name == "SIGTERM"
    assert 20 < step < 60
    for done in [meeting.pool.submit(one.finish) for one in peers]:
        done.result(timeout=30)
    assert meeting.ended.empty()


def test_a_request_before_the_start_needs_no_step(meeting):
    peers = [future.result(timeout=30) for future in [meeting.join(index) for index in range(3)]]

    def compile_and_start(one: Peers) -> str | None:
        """The first two still compile when the request comes; the last waits at the start for them."""
        if one.index == 2:
            time.sleep(0.5)
            return one.stop_after(0, None)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            name = one.stop_before_start("SIGTERM" if one.index == 1 else None)
            if name is not None:
                return name
            time.sleep(0.01)
        return None

    found = [meeting.pool.submit(compile_and_start, one) for one in peers]
    assert [future.result(timeout=30) for future in found] == ["SIGTERM"] * 3
    for done in [meeting.pool.submit(one.finish) for one in peers]:
        done.result(timeout=30)


def test_who_still_compiles_follows_those_who_have_started(meeting):
    peers = [future.result(timeout=30) for future in [meeting.join(index, count=2) for index in range(2)]]
    assert peers[0].stop_after(0, None) is None
    assert peers[1].stop_before_start("SIGTERM") is None
    time.sleep(0.5)  # the answer is: at point 1
    assert peers[1].stop_before_start(None) is None
    assert peers[1].stop_after(0, None) is None
    stops = [meeting.pool.submit(one.stop_after, 1, None) for one in peers]
    assert [future.result(timeout=30) for future in stops] == ["SIGTERM"] * 2
    for done in [meeting.pool.submit(one.finish) for one in peers]:
        done.result(timeout=30)


def test_a_process_that_dies_is_named_to_all(meeting):
    first = meeting.join(0, count=2)
    link = meeting.stranger()
    first = first.result(timeout=30)
    link.close()
    verdict = first.wait_for_verdict(10)
    assert verdict.code == 70
    assert "lost process 1 of 2 on elsewhere" in verdict.text


def test_a_process_that_hangs_is_lost_in_time(meeting):
    first = meeting.join(0, count=2, silence=1.0)
    link = meeting.stranger()
    first = first.result(timeout=30)
    started = time.monotonic()
    verdict = meeting.ended.get(timeout=20)
    assert time.monotonic() - started > 1.0
    assert verdict.code == 70
    assert "nothing was heard of it for 1 s" in verdict.text
    link.close()


@pytest.mark.parametrize(("code", "others", "says"), [(2, 2, "no such file"), (1, 70, "ended with exit code 1: no such file")])
def test_the_failure_of_one_reaches_the_others(meeting, code, others, says):
    peers = [future.result(timeout=30) for future in [meeting.join(index) for index in range(3)]]
    peers[1].leave(code, "no such file")
    for index in (0, 2):
        verdict = peers[index].wait_for_verdict(10)
        assert verdict.code == others
        assert "process 1 of 3" in verdict.text
        assert says in verdict.text


def test_who_does_not_come_is_named_to_those_who_came(meeting):
    texts = refusals([meeting.join(0, count=4, seconds=1.0), meeting.join(2, count=4, seconds=5.0)])
    for text in texts:
        assert "1, 3 did not report" in text
        assert f"127.0.0.1:{meeting.port}" in text


def test_processes_that_do_not_fit_are_refused(meeting):
    for text in refusals([meeting.join(0, count=3), meeting.join(1, count=2)]):
        assert "told of 2 processes" in text


def test_another_config_is_refused(meeting):
    for text in refusals([meeting.join(0, count=2, config="aa"), meeting.join(1, count=2, config="bb")]):
        assert "has config bb" in text


def test_an_unreachable_coordinator_is_named(meeting):
    (text,) = refusals([meeting.join(1, seconds=1.0)])
    assert f"cannot reach process 0 at 127.0.0.1:{meeting.port} within 1 s" in text


def test_a_taken_port_is_named(meeting):
    with socket.create_server(("127.0.0.1", meeting.port)):
        (text,) = refusals([meeting.join(0)])
    assert f"cannot listen at 127.0.0.1:{meeting.port}" in text
