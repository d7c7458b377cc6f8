"""What whole files of tests wait for, in processes of its own, begun before the tests that need none of it.

Those come first and keep one core busy for minutes. A file names in AHEAD which of its fixtures begin so, each with a
function that makes what the fixture gives; the fixture asks `begun` for it.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

# The suite's own, before any test changes it, of a process that is no rank.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}

_futures: dict[Callable[[], Any], Future] = {}
_waiting: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()


def begun(function: Callable[[], Any]) -> Future:
    """The future of `function()`, which runs by now or as soon as those before it are done."""
    if function not in _futures:
        if not _futures:
            # a daemon, so that a suite that is broken off does not wait for it
            threading.Thread(target=_work, daemon=True).start()
        _futures[function] = Future()
        _waiting.put(function)
    return _futures[function]


def _work() -> None:
    while True:
        function = _waiting.get()
        try:
            _futures[function].set_result(function())
        except BaseException as error:
            _futures[function].set_exception(error)
