"""Times on a GPU, from replays of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import cupy


class Replays:
    """Calls captured into a graph, one after another, which is replayed on a stream of its own."""

    def __init__(self, calls: Sequence[Callable[[], None]], first: Sequence[Callable[[], None]]) -> None:
        self._count, self._stream = len(calls), cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        with self._stream as stream:
            for call in first:  # compiles
                call()
            stream.synchronize()
            stream.begin_capture()
            for call in calls:
                call()
            self._graph = stream.end_capture()

    def mean(self, count: int) -> float:
        """Microseconds of a call, over `count` replays."""
        return self._times(count, 1)[0] / count

    def each(self, count: int) -> list[float]:
        """Microseconds of a call, for each of `count` replays."""
        return self._times(1, count)

    def _times(self, replays: int, times: int) -> list[float]:
        events = [cupy.cuda.Event() for _ in range(times + 1)]
        events[0].record(self._stream)
        for event in events[1:]:
            for _ in range(replays):
                self._graph.launch(self._stream)
            event.record(self._stream)
        self._stream.synchronize()
        return [cupy.cuda.get_elapsed_time(x, y) * 1e3 / self._count for x, y in pairwise(events)]
