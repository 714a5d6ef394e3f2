"""The thread that owns a server's completer: requests come in, tokens go out."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Iterable

from tinyllama_lab.deploy.completer import Completer, Completion, Request
from tinyllama_lab.errors import LabError

logger = logging.getLogger(__name__)

_STOPPING = "this server takes no more requests; ask again when it was started again"

_PATIENCE_S = 3


class BusyError(LabError):
    """As many requests are in progress as the server takes."""


class FailedError(LabError):
    """The model failed while it answered."""


class StoppingError(LabError):
    """The server ends, or cannot go on."""


class Answer:
    """One request, and its tokens as they come to the event loop that asked for them.

    Attributes:
        reason: why it ended: `stop` after an end token, or `length`; None before the end.
    """

    def __init__(self, request: Request) -> None:
        """Must be created in an event loop."""
        self.request = request
        self.reason: str | None = None
        self.is_cancelled = False
        self.sent = 0  # tokens; the decoding thread alone uses it
        self._loop = asyncio.get_running_loop()
        self._tokens: asyncio.Queue[int | str | LabError] = asyncio.Queue()

    async def tokens(self) -> AsyncGenerator[int, None]:
        """Yield the tokens; closing the iterator early cancels the request.

        Raises:
            FailedError: the model failed.
            StoppingError: the server ends.
        """
        try:
            while isinstance(token := await self._tokens.get(), int):
                yield token
            if isinstance(token, LabError):
                raise token
            self.reason = token
        finally:
            self.is_cancelled = True

    def send(self, *tokens: int | str | LabError) -> None:
        """Pass tokens on to the event loop; a string is the reason of the end."""
        self.sent += len(tokens)
        if tokens and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, tokens)

    def _put(self, tokens: Iterable[int | str | LabError]) -> None:
        for token in tokens:
            self._tokens.put_nowait(token)


class Scheduler:
    """Runs a completer in a thread, which alone uses it.

    A failure of the completer ends the requests in progress, and the thread goes on.
    """

    def __init__(self, completer: Completer, most: int) -> None:
        """Start the thread.

        Args:
            completer: decodes the requests.
            most: requests in progress; more are refused.
        """
        self._completer = completer
        self._most = most
        self._changed = threading.Condition()  # guards the two that follow
        self._new: list[Answer] = []
        self._is_closed = False
        # requests in progress that the completer knows; None: it does not know it yet
        self._begun: dict[Answer, Completion | None] = {}
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    @property
    def in_progress(self) -> int:
        """Return how many requests wait or run."""
        return len(self._new) + len(self._begun)

    @property
    def is_closed(self) -> bool:
        """Return whether nothing can be asked any more."""
        return self._is_closed

    def check_room(self) -> None:
        """Refuse a request that could not begin now.

        Raises:
            BusyError: the queue is full.
            StoppingError: the server ends.
        """
        if self._is_closed:
            raise StoppingError(_STOPPING)
        if self.in_progress >= self._most:
            raise BusyError(
                f"at most {self._most} requests may be in progress, and that many are; "
                "try again later, or start the server with a larger queue="
            )

    def begin(self, request: Request) -> Answer:
        """Put a request into the queue; called in an event loop.

        Raises:
            BusyError: the queue is full.
            StoppingError: the server ends.
        """
        with self._changed:
            self.check_room()
            answer = Answer(request)
            self._new.append(answer)
            self._changed.notify()
        return answer

    def close(self) -> None:
        """End all requests, and the thread after the current token."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(_PATIENCE_S)
        # still there where the thread reads a long prompt; it ends with the process
        with self._changed:
            waiting = [*self._begun, *self._new]
            self._new.clear()
        for answer in waiting:
            answer.send(StoppingError(_STOPPING))

    def _run(self) -> None:
        try:
            while self._wait() and self._survives_step():
                pass
        finally:
            with self._changed:
                self._is_closed = True
            self._wait()  # takes what came meanwhile
            self._end_all(StoppingError(_STOPPING))

    def _survives_step(self) -> bool:
        """Take a step; after a failure, end all requests and return whether to go on."""
        try:
            self._step()
            return True
        except Exception as error:
            logger.exception("the model failed; the requests in progress end")
            reason = f"{type(error).__name__}: {error}"
        try:  # out of the block above, whose error holds the tensors of its frames
            self._completer.clear()
            return True
        except Exception:
            logger.exception("the model cannot go on; start the server again")
            return False
        finally:
            self._end_all(FailedError(f"the model failed while it answered: {reason}"))

    def _wait(self) -> bool:
        """Wait for work, and take new requests; return whether to go on."""
        with self._changed:
            while not (self._new or self._begun or self._is_closed):
                self._changed.wait()
            self._begun |= dict.fromkeys(self._new)
            self._new.clear()
            return not self._is_closed

    def _step(self) -> None:
        """Take one token for every request that has a row, and pass the tokens on."""
        for answer, completion in self._begun.items():
            if completion is None:
                completion = self._begun[answer] = self._completer.begin(answer.request)
            if answer.is_cancelled:
                completion.reason = completion.reason or "cancelled"
        self._completer.step()
        for answer, completion in list(self._begun.items()):
            assert completion is not None  # all began above
            answer.send(*completion.ids[answer.sent :])
            if completion.reason:
                del self._begun[answer]  # first: who has the answer may ask again at once
                answer.send(completion.reason)

    def _end_all(self, error: LabError) -> None:
        ended, self._begun = self._begun, {}
        for answer in ended:
            answer.send(error)
