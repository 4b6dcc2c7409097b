"""Questions that arrive together are answered together: one batch of the LLM costs less than as many single ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class BusyError(Exception):
    """As many questions wait as may."""


@dataclass(frozen=True)
class _Waiting(Generic[Q, A]):
    question: Q
    answer: asyncio.Future[A]


class Batcher(Generic[Q, A]):
    """Collects questions for a few milliseconds, and answers them in a thread of its own, one batch at a time.

    While a batch is computed the next one gathers. A question whose asker went away is left out.

    Args:
        answer: called in that thread with 1 to ``most`` questions; as many answers.
        most: questions of a batch.
        seconds: how long the first question of a batch waits for others.
        queue: questions that may wait.

    Attributes:
        batches: how many questions each of the latest batches had.
    """

    def __init__(self, answer: Callable[[Sequence[Q]], Sequence[A]], most: int, seconds: float, queue: int) -> None:
        self._answer, self._most, self._seconds = answer, most, seconds
        self._queue: asyncio.Queue[_Waiting[Q, A]] = asyncio.Queue(queue)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._task: asyncio.Task[None] | None = None
        self.batches: list[int] = []

    @property
    def waiting(self) -> int:
        """Questions that wait now."""
        return self._queue.qsize()

    def start(self) -> None:
        """Begin to answer; called where an event loop runs."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """End, after the batch that is being computed."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._thread.shutdown()

    async def ask(self, question: Q) -> A:
        """The answer to a question.

        Raises:
            BusyError: the queue is full.
        """
        waiting: _Waiting[Q, A] = _Waiting(question, asyncio.get_running_loop().create_future())
        try:
            self._queue.put_nowait(waiting)
        except asyncio.QueueFull:
            raise BusyError from None
        return await waiting.answer

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [waiting for waiting in await self._gather() if not waiting.answer.done()]
            if not batch:
                continue
            self.batches = [*self.batches[-99:], len(batch)]
            try:
                answers = await loop.run_in_executor(self._thread, self._answer, [waiting.question for waiting in batch])
            except Exception as error:
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
                continue
            for waiting, answer in zip(batch, answers, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(answer)

    async def _gather(self) -> list[_Waiting[Q, A]]:
        batch = [await self._queue.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                while len(batch) < self._most:
                    batch.append(await self._queue.get())
        while len(batch) < self._most and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        return batch
