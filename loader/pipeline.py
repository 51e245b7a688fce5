"""Batches made ahead of time: the storage is asked for many, a few are gathered, and each is given in its turn."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from loader.format import CHANNELS
from loader.plan import Crops
from loader.readahead import Reader, Ticket
from loader.tiles import Pixels

Arrays = tuple[Pixels, Pixels]

SAMPLES_AHEAD = 256  # asked for ahead of their turn, where nothing else is said


def default_readahead(batch_size: int) -> int:
    """Batches to ask for ahead of their turn: as many as hold SAMPLES_AHEAD samples, at least 2."""
    return max(2, -(-SAMPLES_AHEAD // batch_size))


def run(
    reader: Reader,
    draws: Iterator[Callable[[], Crops]],
    readahead: int,
    threads: int,
    take: Callable[[tuple[int, ...]], Pixels],
) -> Generator[Arrays, None, None]:
    """Give the batches (n, p, p, 3) and (n, p·scale, p·scale, 3), uint8, that are drawn, in order.

    Threads end, and the reader is closed, when the iterator is exhausted, closed or dropped.

    Args:
        reader: how to read them.
        draws: one for each batch, called by another thread when it is time to ask for the batch's data.
        readahead: batches to ask for before those that are being gathered.
        threads: that gather.
        take: gives memory of a shape, to any thread.
    """
    # Asking has a thread of its own: it must not stand in line behind gathers that wait for the storage.
    asker, gatherer = ThreadPoolExecutor(1, "srshards-ask"), ThreadPoolExecutor(threads, "srshards-gather")
    asked: deque[Future[tuple[Ticket, Crops]]] = deque()
    made: deque[Future[Arrays]] = deque()
    try:
        while True:
            while len(asked) + len(made) <= readahead + threads and (draw := next(draws, None)):
                asked.append(asker.submit(_ask, reader, draw))
            while asked and len(made) <= threads:
                made.append(gatherer.submit(_gather, asked.popleft(), reader.sides, take))
            if not made:
                return
            yield made.popleft().result()
    finally:
        asker.shutdown(cancel_futures=True)
        gatherer.shutdown(cancel_futures=True)
        reader.close()


def _ask(reader: Reader, draw: Callable[[], Crops]) -> tuple[Ticket, Crops]:
    crops = draw()
    return reader.ask(crops), crops


def _gather(
    asked: Future[tuple[Ticket, Crops]], sides: tuple[int, int], take: Callable[[tuple[int, ...]], Pixels]
) -> Arrays:
    ticket, crops = asked.result()
    lr, hr = (take((len(crops.image), side, side, CHANNELS)) for side in sides)
    ticket.gather(lr, hr)
    return lr, hr
