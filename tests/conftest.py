"""What several test files need: own operators that leave no trace, and the flag that rewrites scenarios."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from blobspace.ops.registry import REGISTRY

JOIN_S = 20.0

# Every run tries the same examples; ``--hypothesis-profile=default`` looks for new ones.
settings.register_profile("blobspace", derandomize=True, deadline=None)
settings.load_profile("blobspace")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-scenarios",
        action="store_true",
        default=False,
        help="write what the protocol machines answer into tests/scenarios/*.txt instead of comparing",
    )


@pytest.fixture
def own_operators() -> Iterator[None]:
    """Operators that a test registers are forgotten after it."""
    tables = (REGISTRY.schemas, REGISTRY.implementations, REGISTRY.gradients, REGISTRY.makers)
    before = [dict(table) for table in tables]
    yield
    for table, known in zip(tables, before, strict=True):
        table.clear()
        table.update(known)  # type: ignore[arg-type]


@pytest.fixture
def in_thread() -> Iterator[Callable[[Callable[[], object]], Background]]:
    """Run something in a thread; whatever it raised is raised again by ``finish``, and nothing outlives the test."""
    begun: list[Background] = []

    def begin(work: Callable[[], object]) -> Background:
        begun.append(Background(work))
        return begun[-1]

    yield begin
    for background in begun:
        background.thread.join(JOIN_S)
        assert not background.thread.is_alive()


class Background:
    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self.error: BaseException | None = None
        self.result: object = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:  # noqa: BLE001  (raised again in finish)
            self.error = error

    def finish(self) -> object:
        self.thread.join(JOIN_S)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.result
