"""One protocol on its way: performs what the machine of ``operations.py`` asks for, and tells it what comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeAlias

from ..ops.errors import BlobspaceError
from .operations import Action, Call, CheckpointOperation, Finish, Operation, Publish

_TICK_S = 0.5
_CALLS_END_S = 5.0
_Event: TypeAlias = Callable[[], list[Action]]


class ProtocolRun:
    """Runs in the coordinator's event loop.

    Args:
        operation: The machine.
        call: Calls a workspace; raises :class:`BlobspaceError` alone.
        publish: Commits a checkpoint, given its receipts; runs in a thread. None for a protocol without a commit.
    """

    def __init__(
        self,
        operation: Operation,
        *,
        call: Callable[[Call], Awaitable[Any]],
        publish: Callable[[Any], Any] | None,
    ) -> None:
        self._operation = operation
        self._call = call
        self._publish = publish
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    async def to_the_end(self) -> Any:
        """Return the protocol's result.

        Raises:
            BlobspaceError: It has failed; every workspace that answers has let go of what it held.
        """
        actions = self._operation.start()
        try:
            while True:
                for action in actions:
                    if isinstance(action, Finish):
                        return await self._finish(action)
                    self._perform(action)
                try:
                    event = await asyncio.wait_for(self._events.get(), _TICK_S)
                    actions = event()
                except asyncio.TimeoutError:
                    actions = self._operation.tick(time.monotonic())
        finally:
            for task in self._tasks:
                task.cancel()

    def lose(self, workspace: str, error: BlobspaceError) -> None:
        """Tell the machine that a workspace is gone."""
        self._events.put_nowait(lambda: self._operation.lost(workspace, error, time.monotonic()))

    async def _finish(self, finish: Finish) -> Any:
        # A writer that was called off may still be busy with a file; what is cleaned up next should not move.
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=_CALLS_END_S)
        if finish.error is not None:
            raise finish.error
        return finish.result

    def _perform(self, action: Call | Publish) -> None:
        if isinstance(action, Call):
            self._begin(self._perform_call(action))
        else:
            self._begin(self._perform_publish(action))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _perform_call(self, action: Call) -> None:
        operation = self._operation
        try:
            value = await self._call(action)
        except BlobspaceError as error:
            failure = error
            self._events.put_nowait(lambda: operation.failed(action.workspace, action.phase, failure, time.monotonic()))
        else:
            self._events.put_nowait(lambda: operation.answered(action.workspace, action.phase, value, time.monotonic()))

    async def _perform_publish(self, action: Publish) -> None:
        operation = self._operation
        assert self._publish is not None
        assert isinstance(operation, CheckpointOperation)
        try:
            result = await asyncio.to_thread(self._publish, action.receipts)
        except BlobspaceError as error:
            failure = error
            self._events.put_nowait(lambda: operation.publish_failed(failure, time.monotonic()))
        else:
            self._events.put_nowait(lambda: operation.published(result, time.monotonic()))
