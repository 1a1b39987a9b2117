"""The gate: work goes through one piece at a time, a barrier stops it at one moment, and no hold lasts for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from blobspace.ops.errors import ConflictError, DeadlineError
from blobspace.workspace_actors.gate import Gate

WAIT_S = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(clock: Clock) -> Gate:
    return Gate("w0", clock)


class Worker:
    """Runs pieces of work on demand, and says where each one is."""

    def __init__(self, gate: Gate, in_thread: Callable[..., Any], pieces: int = 1, *, collective: bool = False) -> None:
        self.entered = [threading.Event() for _ in range(pieces)]
        self.may_end = [threading.Event() for _ in range(pieces)]

        def run() -> None:
            for entered, may_end in zip(self.entered, self.may_end, strict=True):
                with gate.work("net 'n'", collective=collective):
                    entered.set()
                    assert may_end.wait(WAIT_S)

        self.background = in_thread(run)

    def wait_in(self, piece: int = 0) -> None:
        assert self.entered[piece].wait(WAIT_S)

    def end(self, piece: int = 0) -> None:
        self.may_end[piece].set()


def pass_through(gate: Gate, *, collective: bool = False) -> None:
    with gate.work("work", collective=collective):
        pass


class TestHold:
    def test_without_a_barrier_work_goes_through(self, gate: Gate) -> None:
        for _ in range(3):
            pass_through(gate, collective=True)
        pass_through(gate)
        assert gate.collective_iterations == 3

    def test_a_hold_answers_at_once_while_work_runs_and_waits_for_its_end(
        self, gate: Gate, in_thread: Callable[..., Any]
    ) -> None:
        worker = Worker(gate, in_thread, 2, collective=True)
        worker.wait_in(0)
        assert gate.hold("b", seconds=WAIT_S) == 1
        stop = in_thread(lambda: gate.wait_stopped("b", target=1))
        assert stop.thread.is_alive()
        worker.end(0)
        stop.finish()
        assert not worker.entered[1].is_set()
        assert gate.resume("b")
        worker.wait_in(1)
        worker.end(1)
        worker.background.finish()

    def test_an_idle_workspace_stops_at_once(self, gate: Gate) -> None:
        assert gate.hold("b", seconds=1) == 0
        gate.wait_stopped("b", target=0)
        assert gate.holds("b")
        assert gate.resume("b")
        assert not gate.holds("b")
        pass_through(gate)

    def test_work_that_fails_lets_the_next_one_in(self, gate: Gate) -> None:
        with pytest.raises(ZeroDivisionError), gate.work("w"):
            _ = 1 / 0
        gate.hold("b", seconds=1)
        gate.wait_stopped("b", target=0)

    def test_resuming_twice_or_another_barrier_says_so(self, gate: Gate) -> None:
        gate.hold("b", seconds=1)
        assert not gate.resume("other")
        assert gate.resume("b")
        assert not gate.resume("b")

    def test_a_second_barrier_is_refused_while_the_first_holds(self, gate: Gate) -> None:
        gate.hold("b", seconds=5)
        with pytest.raises(ConflictError, match="held by barrier 'b'; barrier 'c' must wait"):
            gate.hold("c", seconds=5)
        assert gate.holds("b")
        with pytest.raises(ConflictError):
            gate.wait_stopped("c", target=0)
        gate.resume("b")
        gate.hold("c", seconds=5)
        with pytest.raises(ConflictError, match="no longer"):
            gate.wait_stopped("b", target=0)

    def test_the_same_barrier_may_hold_again_and_prolongs(self, gate: Gate, clock: Clock) -> None:
        gate.hold("b", seconds=5)
        clock.now += 4
        gate.hold("b", seconds=5)
        clock.now += 4
        assert gate.holds("b")


class TestTarget:
    def test_a_workspace_behind_the_target_goes_on_up_to_it_and_stops(
        self, gate: Gate, in_thread: Callable[..., Any]
    ) -> None:
        pass_through(gate, collective=True)
        assert gate.hold("b", seconds=WAIT_S) == 1
        worker = Worker(gate, in_thread, 3, collective=True)
        stop = in_thread(lambda: gate.wait_stopped("b", target=3))
        for piece in (0, 1):
            worker.wait_in(piece)
            assert stop.thread.is_alive()
            worker.end(piece)
        stop.finish()
        assert gate.collective_iterations == 3
        assert not worker.entered[2].is_set()
        gate.resume("b")
        worker.wait_in(2)
        worker.end(2)
        worker.background.finish()

    def test_other_work_goes_through_too_while_it_is_behind(self, gate: Gate, in_thread: Callable[..., Any]) -> None:
        gate.hold("b", seconds=WAIT_S)
        stop = in_thread(lambda: gate.wait_stopped("b", target=1))
        in_thread(lambda: (pass_through(gate), pass_through(gate, collective=True))).finish()
        stop.finish()
        assert gate.collective_iterations == 1

    def test_without_a_target_nothing_starts(self, gate: Gate, in_thread: Callable[..., Any]) -> None:
        gate.hold("b", seconds=WAIT_S)
        work = in_thread(lambda: pass_through(gate, collective=True))
        assert gate.collective_iterations == 0
        gate.resume("b")
        work.finish()
        assert gate.collective_iterations == 1

    def test_one_that_nobody_asks_to_go_on_misses_the_deadline_and_says_so(self, gate: Gate, clock: Clock) -> None:
        gate.hold("b", seconds=5)
        clock.now += 5
        with pytest.raises(DeadlineError, match=r"started 0 collective iteration\(s\), others 2, and nobody"):
            gate.wait_stopped("b", target=2)
        pass_through(gate)

    def test_an_iteration_that_failed_is_given_up_by_everybody(self, gate: Gate) -> None:
        pass_through(gate, collective=True)
        pass_through(gate, collective=True)
        gate.give_up_iteration(2)
        assert gate.collective_iterations == 1
        gate.give_up_iteration(2)
        assert gate.collective_iterations == 1
        gate.reset_iterations()
        assert gate.collective_iterations == 0
        gate.give_up_iteration(1)
        assert gate.collective_iterations == 0


class TestDeadlines:
    def test_work_that_does_not_end_in_time_is_named_and_the_hold_is_taken_off(
        self, gate: Gate, clock: Clock, in_thread: Callable[..., Any]
    ) -> None:
        worker = Worker(gate, in_thread, 2)
        worker.wait_in(0)
        gate.hold("b", seconds=5)
        clock.now += 5
        with pytest.raises(DeadlineError, match="still in net 'n'"):
            gate.wait_stopped("b", target=0)
        assert not gate.holds("b")
        worker.end(0)
        worker.wait_in(1)
        worker.end(1)
        worker.background.finish()

    def test_a_hold_that_nobody_ends_ends_by_itself(self, gate: Gate, clock: Clock) -> None:
        gate.hold("b", seconds=5)
        gate.wait_stopped("b", target=0)
        clock.now += 4.999
        assert gate.holds("b")
        clock.now += 0.001
        assert not gate.holds("b")
        assert not gate.resume("b")
        pass_through(gate)

    def test_work_that_waits_goes_on_when_the_hold_expires(self, in_thread: Callable[..., Any]) -> None:
        import time

        gate = Gate("w0", time.monotonic)
        gate.hold("b", seconds=0.05)
        in_thread(lambda: pass_through(gate)).finish()
        with pytest.raises(ConflictError):
            gate.wait_stopped("b", target=0)

    def test_an_expired_hold_does_not_stop_another_barrier(self, gate: Gate, clock: Clock) -> None:
        gate.hold("b", seconds=5)
        clock.now += 6
        assert gate.hold("c", seconds=5) == 0
        assert gate.holds("c")

    def test_a_resume_while_somebody_waits_for_the_stop_ends_the_wait(
        self, gate: Gate, in_thread: Callable[..., Any]
    ) -> None:
        worker = Worker(gate, in_thread)
        worker.wait_in()
        gate.hold("b", seconds=WAIT_S)
        stop = in_thread(lambda: gate.wait_stopped("b", target=0))
        gate.resume("b")
        with pytest.raises(ConflictError, match="no longer"):
            stop.finish()
        worker.end()


class TestBetweenWork:
    def test_an_idle_or_held_workspace_is_between_work(self, gate: Gate) -> None:
        with gate.between_work(seconds=0):
            pass
        gate.hold("b", seconds=5)
        with gate.between_work(seconds=0):
            pass
        assert gate.holds("b")

    def test_it_names_the_work_that_did_not_end(self, gate: Gate, in_thread: Callable[..., Any]) -> None:
        worker = Worker(gate, in_thread)
        worker.wait_in()
        with pytest.raises(DeadlineError, match=r"within 0\.01 s: it is in net 'n'"), gate.between_work(seconds=0.01):
            pass
        worker.end()
        worker.background.finish()
        pass_through(gate)

    def test_whoever_waits_gets_the_very_next_moment_however_fast_work_follows_on_work(
        self, gate: Gate, in_thread: Callable[..., Any]
    ) -> None:
        for _ in range(20):
            worker = Worker(gate, in_thread, 2)
            worker.wait_in(0)
            waiting, seen = threading.Event(), threading.Event()

            def look(waiting: threading.Event = waiting, seen: threading.Event = seen) -> None:
                waiting.set()
                with gate.between_work(seconds=WAIT_S):
                    seen.set()

            looker = in_thread(look)
            assert waiting.wait(WAIT_S)
            wait_until_somebody_waits(gate)
            worker.end(0)
            looker.finish()
            assert seen.is_set()
            worker.wait_in(1)
            worker.end(1)
            worker.background.finish()


def wait_until_somebody_waits(gate: Gate) -> None:
    """Return when a thread sleeps in the gate's condition."""
    moment = threading.Event()
    for _ in range(2000):
        with gate._changed:
            if gate._changed._waiters:  # type: ignore[attr-defined]
                return
        moment.wait(0.005)
    raise AssertionError("nobody waits")


def test_an_iteration_given_up_during_a_barrier_is_not_waited_for(clock: Clock) -> None:
    gate = Gate("w", clock)
    with gate.work("net", collective=True):
        assert gate.hold("b", seconds=10) == 1
        gate.give_up_iteration(1)
    # All members have given it up, so the greatest count that was answered is never reached again.
    gate.wait_stopped("b", target=1)
    assert gate.holds("b")
