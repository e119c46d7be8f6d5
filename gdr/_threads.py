"""Threads of the CPU backends: independent jobs over Python threads, with BLAS held at one thread meanwhile.

The products of one head are too small to be worth splitting, and BLAS threads under Python threads fight each
other for the cores.  So heads and sequences go over Python threads (NumPy releases the interpreter lock
inside a product), and BLAS keeps to the thread that calls it.
"""

from __future__ import annotations

import _thread
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache, partial
from queue import SimpleQueue
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

Job = TypeVar("Job")

__all__ = ["for_each", "one_blas_thread", "thin_products", "thread_count", "uninterrupted"]


def thread_count() -> int:
    """How many threads may work at once: GDR_NUM_THREADS, or the CPUs this process may run on."""
    asked = os.environ.get("GDR_NUM_THREADS", "")
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            raise ValueError(f"GDR_NUM_THREADS: expected a whole number of at least 1, got {asked!r}")
        return int(asked)
    return _cpu_count()


@lru_cache(maxsize=1)
def _cpu_count() -> int:
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
                    _set_num_threads(library, 1)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for library, count in zip(self._libraries or [], self._counts, strict=True):
                    _set_num_threads(library, count)

    def look_again(self) -> None:
        """Search for BLAS libraries anew: a module that brings another one has been imported."""
        with self._lock:
            if self._inside == 0:
                self._libraries = None


def _set_num_threads(library: Any, count: int) -> None:
    # The public setter of some versions obeys only the first thread that ever called it.
    getattr(library, "_real_set_num_threads", library.set_num_threads)(count)


one_blas_thread = _OneBlasThread()

# OpenBLAS's kernels for AVX-512, which multiply by a matrix of few rows or columns without copying the other one first.
_THIN_PRODUCTS = {"SkylakeX", "Cooperlake", "SapphireRapids"}


@lru_cache(maxsize=1)
def thin_products() -> bool:
    """Whether a product of two rows with a matrix costs little more than that of one row."""
    libraries = ThreadpoolController().select(internal_api="openblas").lib_controllers
    return any(library.architecture in _THIN_PRODUCTS for library in libraries)


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
_tasks: SimpleQueue[_Once] | None = None  # of the main thread, for the one that works in its place


def _forget_pool() -> None:
    # Threads do not survive a fork.
    global _pool, _pool_lock, _tasks
    _pool, _pool_lock, _tasks = None, threading.Lock(), None
    one_blas_thread.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _the_pool() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(_cpu_count() + 1, thread_name_prefix="gdr")
        return _pool


def for_each(work: Callable[[Iterator[Job]], None], jobs: Sequence[Job], threads: int) -> None:
    """Work through `jobs` on up to `threads` threads, the caller's among them.

    Each thread calls ``work(jobs)`` once, with an iterator that hands every job to one of them; so a thread
    can make its scratch arrays once.  Returns, or raises a thread's exception, when all threads are done.
    """
    threads = min(threads, len(jobs))
    if threads <= 1:
        work(iter(jobs))
    else:
        uninterrupted(partial(_for_each, work, jobs, threads))


def _for_each(work: Callable[[Iterator[Job]], None], jobs: Sequence[Job], threads: int) -> None:
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


class _Once:
    """Runs a function on whichever call comes first; it has returned or raised when `done`, and `finished` is free."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._unclaimed = threading.Lock()
        self.finished = threading.Lock()
        self.finished.acquire()
        self.done = False
        self.error: BaseException | None = None

    def __call__(self) -> None:
        if not self._unclaimed.acquire(blocking=False):
            return
        try:
            self._function()
        except BaseException as error:
            self.error = error
        finally:
            self.done = True
            self.finished.release()


def _run_tasks(tasks: SimpleQueue[_Once]) -> None:
    while True:
        tasks.get()()


def uninterrupted(function: Callable[[], None]) -> None:
    """Call `function` so that a signal handler that raises, as on Ctrl-C, does so only after it has returned.

    Handlers run in the main thread, between any two steps of it; so another thread does the work, and the main
    one, should it be interrupted while it hands the work over or waits, makes sure again that it gets done.
    """
    global _tasks
    if threading.current_thread() is not threading.main_thread():
        function()
        return
    task = _Once(function)
    interrupt: BaseException | None = None
    # Only what is one step of the interpreter: an executor, an event or a thread object takes locks in Python, and
    # an exception between two of its steps would leave them taken for ever.
    while not task.done:
        try:
            if _tasks is None:
                tasks: SimpleQueue[_Once] = SimpleQueue()
                _thread.start_new_thread(_run_tasks, (tasks,))
                _tasks = tasks
            _tasks.put(task)
            task.finished.acquire()
        except BaseException as error:
            interrupt = error
    if task.error is not None:
        raise task.error
    if interrupt is not None:
        raise interrupt
