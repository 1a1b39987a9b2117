"""The protocols of checkpoint and restore, as traces in text files, and in any order of events.

A scenario is a list of paragraphs: one line says what happens, the lines below it what the machine answers.
``pytest --rewrite-scenarios`` writes the answers anew; read the difference before you commit it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blobspace.cluster.operations import (
    RELEASE_S,
    Action,
    Call,
    CheckpointOperation,
    Finish,
    Operation,
    Publish,
    RestoreOperation,
)
from blobspace.ops.errors import BlobspaceError, DeadlineError, StorageError, WorkspaceLostError

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))
PHASES = {
    "checkpoint": ("hold", "freeze", "resume", "write", "release"),
    "restore": ("prepare", "hold", "stop", "apply", "release"),
}


def make(protocol: str, members: tuple[str, ...], **options: Any) -> Operation:
    common: dict[str, Any] = {
        "barrier": "b1",
        "generation": 3,
        "members": members,
        "deadline_s": 60.0,
        "now": 0.0,
        **options,
    }
    if protocol == "checkpoint":
        return CheckpointOperation(**common, make_writer=lambda rank: f"writer{rank}")
    return RestoreOperation(**common, make_loader=lambda name: f"loader-{name}")


class Trace:
    """Carries out the event lines of a scenario."""

    def __init__(self) -> None:
        self.operation: Operation | None = None

    def do(self, line: str) -> list[str]:
        word, *rest = line.split()
        if word == "start":
            protocol, *options = rest
            given = dict(option.split("=") for option in options)
            last = given.get("last")
            self.operation = make(
                protocol, tuple(given["members"].split(",")), last_committed=None if last is None else int(last)
            )
            return self.shown(self.operation.start())
        operation = self.operation
        assert operation is not None
        return self.shown(self.event(operation, word, rest))

    def event(self, operation: Operation, word: str, rest: list[str]) -> list[Action]:
        # "at 5 …" sets the time; without it an event takes a second.
        now = operation.now + 1
        if word == "at":
            now, word, rest = float(rest[0]), rest[1], rest[2:]
        match word, rest:
            case "answer", [workspace, phase, *value]:
                return operation.answered(workspace, phase, int(value[0]) if value else None, now)
            case "fail", [workspace, phase, *text]:
                return operation.failed(workspace, phase, StorageError(" ".join(text) or "Disk full."), now)
            case "fail-lost", [workspace, phase]:
                return operation.failed(workspace, phase, WorkspaceLostError("Its process is gone."), now)
            case "lose", [workspace]:
                return operation.lost(workspace, WorkspaceLostError("Its node is gone.", node="n7"), now)
            case "tick", []:
                return operation.tick(now)
            case "published", []:
                assert isinstance(operation, CheckpointOperation)
                return operation.published("manifest", now)
            case "publish-fails", []:
                assert isinstance(operation, CheckpointOperation)
                return operation.publish_failed(StorageError("The root is not shared."), now)
            case _:
                raise AssertionError(f"no event: {word} {rest}")

    def shown(self, actions: list[Action]) -> list[str]:
        assert self.operation is not None
        return [*map(shown, actions), f"({self.operation.phase}: {' '.join(self.operation.waiting_for) or 'nobody'})"]


def shown(action: Action) -> str:
    match action:
        case Call():
            arguments = ", ".join(map(str, action.arguments))
            assert action.method == action.phase
            return f"call {action.workspace}.{action.method}({arguments})"
        case Publish():
            return f"publish {dict(action.receipts)}"
        case Finish(error=None):
            return f"finish {action.result}"
        case Finish():
            assert action.result is None
            return f"finish {type(action.error).__name__}: {' | '.join(str(action.error).splitlines())}"


def play(text: str) -> str:
    """Return the scenario with the machine's answers in place of those that are there."""
    trace = Trace()
    out: list[str] = []
    for line in text.splitlines():
        if line.startswith("    "):
            continue
        out.append(line)
        if line.strip() and not line.startswith("#"):
            out.extend(f"    {answer}" for answer in trace.do(line))
    return "\n".join(out) + "\n"


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_trace_is_the_scenarios(path: Path, request: pytest.FixtureRequest) -> None:
    text = path.read_text(encoding="utf-8")
    played = play(text)
    if request.config.getoption("--rewrite-scenarios"):
        path.write_text(played, encoding="utf-8")
    else:
        assert played == text


def test_there_are_scenarios_for_both_protocols() -> None:
    stems = {path.stem.partition("_")[0] for path in SCENARIOS}
    assert stems == {"checkpoint", "restore"}


MEMBERS = ("w0", "w1", "w2")
EVENTS = st.tuples(
    st.sampled_from(["answer", "answer", "answer", "answer", "fail", "fail-lost", "lose", "tick", "late", "publish"]),
    st.integers(0, 10),
    st.sampled_from([*MEMBERS, "stranger"]),
    st.floats(0, 40),
)


class Cluster:
    """Answers calls in any order, and knows what must never happen."""

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol
        self.operation = make(protocol, MEMBERS, last_committed=4)
        self.open: list[Call] = []
        self.done: dict[str, set[str]] = {phase: set() for phase in PHASES[protocol]}
        self.is_publishing = False
        self.finishes: list[Finish] = []
        self.lost: set[str] = set()
        self.receive(self.operation.start())

    def receive(self, actions: list[Action]) -> None:
        for action in actions:
            assert not self.finishes
            match action:
                case Call():
                    assert action.method == action.phase == self.operation.phase
                    assert action.arguments[:2] == (3, "b1")
                    phases = PHASES[self.protocol]
                    before = phases[: phases.index(action.phase)]
                    if action.phase != "release":
                        assert action.workspace not in self.lost
                        for phase in before:
                            assert self.done[phase] == set(MEMBERS), f"{action.phase} before all have done {phase}"
                    self.open.append(action)
                case Publish():
                    assert self.done["write"] == set(MEMBERS)
                    assert set(action.receipts) == set(MEMBERS)
                    assert not self.is_publishing
                    self.is_publishing = True
                case Finish():
                    assert (action.error is None) or action.result is None
                    self.finishes.append(action)

    def do(self, event: tuple[str, int, str, float]) -> None:
        what, which, workspace, step = event
        now = self.operation.now + step
        if what in ("answer", "fail", "fail-lost") and self.open:
            call = self.open.pop(which % len(self.open))
            if what == "answer":
                if call.phase == self.operation.phase:
                    self.done[call.phase].add(call.workspace)
                self.receive(self.operation.answered(call.workspace, call.phase, which, now))
            else:
                error = StorageError("x") if what == "fail" else WorkspaceLostError("x")
                self.receive(self.operation.failed(call.workspace, call.phase, error, now))
        elif what == "lose":
            if workspace in MEMBERS:
                self.lost.add(workspace)
            self.receive(self.operation.lost(workspace, WorkspaceLostError("x"), now))
        elif what == "tick":
            self.receive(self.operation.tick(now))
        elif what == "late":
            phase = PHASES[self.protocol][which % 5]
            if phase != self.operation.phase:
                assert self.operation.answered(workspace, phase, None, self.operation.now) == []
                if phase != "release":
                    assert self.operation.failed(workspace, phase, StorageError("x"), self.operation.now) == []
        elif what == "publish" and self.is_publishing and self.operation.phase == "publish":
            assert isinstance(self.operation, CheckpointOperation)
            if which % 3:
                self.receive(self.operation.published("manifest", now))
            else:
                self.receive(self.operation.publish_failed(StorageError("x"), now))

    def end(self) -> None:
        for _ in range(3):
            if self.operation.phase == "publish":
                self.do(("publish", 1, "w0", 0.0))
            self.receive(self.operation.tick(self.operation.now + 1000))


@pytest.mark.parametrize("protocol", ["checkpoint", "restore"])
@settings(max_examples=150, deadline=None)
@given(events=st.lists(EVENTS, max_size=60))
def test_any_order_of_events_ends_in_exactly_one_finish(
    protocol: str, events: list[tuple[str, int, str, float]]
) -> None:
    cluster = Cluster(protocol)
    for event in events:
        cluster.do(event)
    cluster.end()
    assert len(cluster.finishes) == 1
    assert cluster.operation.is_over
    finish = cluster.finishes[0]
    if finish.error is None and protocol == "checkpoint":
        assert cluster.is_publishing
        assert finish.result == "manifest"
    if finish.error is None and protocol == "restore":
        assert cluster.done["apply"] == set(MEMBERS)
    assert cluster.operation.tick(1e9) == []
    assert cluster.operation.lost("w0", WorkspaceLostError("x"), 1e9) == []
    assert cluster.operation.answered("w0", "release", None, 1e9) == []
    assert cluster.operation.failed("w0", "release", StorageError("x"), 1e9) == []


def test_phases_are_stamped_with_the_time_at_which_they_began() -> None:
    trace = Trace()
    for line in ("start checkpoint members=w0", "at 2 answer w0 hold 0", "at 3 answer w0 freeze 7"):
        trace.do(line)
    assert trace.operation is not None
    assert trace.operation.phase_began == {"hold": 0.0, "freeze": 2.0, "resume": 3.0}
    assert isinstance(trace.operation, CheckpointOperation)


@pytest.mark.parametrize("protocol", ["checkpoint", "restore"])
def test_the_errors_carry_what_a_handler_needs(protocol: str) -> None:
    operation = make(protocol, ("w0", "w1"), last_committed=4)
    operation.start()
    operation.lost("w1", WorkspaceLostError("gone", node="n7"), 1.0)
    finish = operation.answered("w0", "release", None, 2.0)
    assert isinstance(finish[0], Finish)
    lost = finish[0].error
    assert isinstance(lost, WorkspaceLostError)
    assert lost.fields == {"node": "n7", "workspace": "w1", "last_committed_step": 4}

    operation = make(protocol, ("w0", "w1"))
    operation.start()
    operation.tick(60.0)
    finish = operation.tick(60.0 + RELEASE_S)
    assert isinstance(finish[0], Finish)
    late: BlobspaceError | None = finish[0].error
    assert isinstance(late, DeadlineError)
    assert late.fields == {"workspaces": ["w0", "w1"], "phase": PHASES[protocol][0], "waited_s": 60.0}
