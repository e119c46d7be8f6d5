"""Threads of the CPU backends: independent jobs over Python threads, with BLAS held at one thread meanwhile.

The products of one head are too small to be worth splitting, and BLAS threads under Python threads fight each
other for the cores.  So heads and sequences go over Python threads (NumPy releases the interpreter lock
inside a product), and BLAS keeps to the thread that calls it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

Job = TypeVar("Job")

__all__ = ["for_each", "one_blas_thread", "thread_count", "uninterrupted"]


def thread_count() -> int:
    """How many threads may work at once: GDR_NUM_THREADS, or the CPUs this process may run on."""
    asked = os.environ.get("GDR_NUM_THREADS", "")
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            raise ValueError(f"GDR_NUM_THREADS: expected a whole number of at least 1, got {asked!r}")
        return int(asked)
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows know no affinity
        return os.cpu_count() or 1


class _OneBlasThread:
    """Context manager: every BLAS of the process runs on one thread until the last one inside has left.

    Calls may overlap, from several threads as well.  The first to enter remembers the thread counts and the
    last to leave restores them: if each restored what it had found, the counts could stay at one for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._libraries: list[Any] | None = None
        self._counts: list[int] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                if self._libraries is None:
                    # Finding the libraries takes milliseconds; setting their counts takes microseconds.
                    self._libraries = ThreadpoolController().select(user_api="blas").lib_controllers
                self._counts = [library.get_num_threads() for library in self._libraries]
                for library in self._libraries:
                    library.set_num_threads(1)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for library, count in zip(self._libraries or [], self._counts, strict=True):
                    library.set_num_threads(count)

    def look_again(self) -> None:
        """Search for BLAS libraries anew: a module that brings another one has been imported."""
        with self._lock:
            if self._inside == 0:
                self._libraries = None


one_blas_thread = _OneBlasThread()


class _SharedIterator(Iterator[Job]):
    """An iterator that several threads may draw from."""

    def __init__(self, items: Sequence[Job]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()

    def __next__(self) -> Job:
        with self._lock:
            return next(self._items)


_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _forget_pool() -> None:
    # The threads of a pool do not survive a fork.
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()
    one_blas_thread.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _the_pool() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor((os.cpu_count() or 1) + 1, thread_name_prefix="gdr")
        return _pool


def for_each(work: Callable[[Iterator[Job]], None], jobs: Sequence[Job], threads: int) -> None:
    """Work through `jobs` on up to `threads` threads, the caller's among them.

    Each thread calls ``work(jobs)`` once, with an iterator that hands every job to one of them; so a thread
    can make its scratch arrays once.  Returns, or raises a thread's exception, when all threads are done.
    """
    threads = min(threads, len(jobs))
    if threads <= 1:
        work(iter(jobs))
        return
    shared = _SharedIterator(jobs)
    pool = _the_pool()
    helpers = [pool.submit(work, shared) for _ in range(threads - 1)]
    try:
        work(shared)
    finally:
        # All threads of the pool may be busy; nobody needs a helper that has not started when the work is done.
        started = [helper for helper in helpers if not helper.cancel()]
        wait(started)
    for helper in started:
        helper.result()


def uninterrupted(function: Callable[[], None]) -> None:
    """Call `function` so that a signal handler that raises, as on Ctrl-C, does so only after it has returned.

    Handlers run in the main thread, wherever that happens to be; so another thread does the work.
    """
    if threading.current_thread() is not threading.main_thread():
        function()
        return
    task = _the_pool().submit(function)
    interrupt: BaseException | None = None
    while not task.done():
        try:
            wait((task,))
        except BaseException as error:
            interrupt = error
    task.result()
    if interrupt is not None:
        raise interrupt
