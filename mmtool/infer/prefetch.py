"""Prepare items in a thread while the ones before them are in use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

from mmtool.threads import computing_alone

T = TypeVar("T")

_END = object()


class Prefetch(Generic[T]):
    """Iterates over ``items``, whose next ones a thread makes, at most ``size`` ahead.

    An error of ``items`` is raised where its item would come.
    """

    def __init__(self, items: Iterable[T], size: int) -> None:
        self._items = items
        self._made: queue.Queue[tuple[object, BaseException | None]] = queue.Queue(size)
        self._closed = threading.Event()
        self._begin = computing_alone()
        self._thread = threading.Thread(target=self._make, name="mmtool-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item, error = self._made.get()
        if error is not None or item is _END:
            self._made.put((_END, None))  # asked again: still the end
            raise error or StopIteration
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop the thread; one that waits for the network is left behind."""
        self._closed.set()
        self._thread.join(timeout=1)

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(self) -> None:
        try:
            self._begin()
            for item in self._items:
                if not self._put(item, None):
                    return
        except BaseException as error:  # whatever it is, it belongs to the thread that iterates
            self._put(None, error)
        else:
            self._put(_END, None)

    def _put(self, item: object, error: BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._made.put((item, error), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
