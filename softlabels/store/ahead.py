"""Work done ahead in threads, as much as memory allows: storage answers late, and many at once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Done = TypeVar("Done")

THREADS = 8


def work_ahead(
    items: Iterable[Item],
    work: Callable[[Item], Done],
    size_of: Callable[[Item], int],
    most_bytes: int,
    threads: int = THREADS,
) -> Iterator[tuple[Item, Done]]:
    """Each item and what `work` makes of it, in order, begun before it is asked for.

    Args:
        items: what to work on.
        work: runs in a thread; what it raises is raised here, at its item.
        size_of: bytes of memory that an item takes until it was handed out.
        most_bytes: of all that wait; a single larger item is worked on alone.
        threads: most at once.
    """
    waiting: deque[tuple[Item, int, Future[Done]]] = deque()
    coming = iter(items)
    held = 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            upcoming = next(coming, None)
            while upcoming is not None or waiting:
                while upcoming is not None and (
                    not waiting or held + size_of(upcoming) <= most_bytes
                ):
                    size = size_of(upcoming)
                    waiting.append((upcoming, size, pool.submit(work, upcoming)))
                    held += size
                    upcoming = next(coming, None)
                item, size, future = waiting.popleft()
                yield item, future.result()
                held -= size
        finally:
            for _, _, future in waiting:
                future.cancel()
