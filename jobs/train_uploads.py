"""Publishing beside the training loop: on a thread, one thing at a time, and nothing that failed is forgotten."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

log = logging.getLogger(__name__)


class Uploads:
    """What an upload raises comes out of the next call of `check`, `wait` or `start`, in the caller's thread."""

    def __init__(self) -> None:
        self._under_way: Future[None] | None = None

    def start(self, publish: Callable[[], None]) -> None:
        """Once the one before is done, so that no more than one holds its bytes."""
        self.wait()
        future: Future[None] = Future()
        # A daemon: whoever asks twice to stop does not wait for a store, and half a checkpoint is none.
        threading.Thread(target=_run, args=(publish, future), name="upload", daemon=True).start()
        self._under_way = future

    def check(self) -> None:
        """Without waiting."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def wait_beside(self, error: BaseException) -> None:
        """Before `error` ends the run: what is under way still counts, but is not why the run ends."""
        try:
            self.wait()
        except Exception as other:  # noqa: BLE001 - said, and the first error is raised on
            log.error("an upload failed as well: %s (beside %s)", other, type(error).__name__)


def _run(publish: Callable[[], None], future: Future[None]) -> None:
    try:
        publish()
    except BaseException as error:  # noqa: BLE001 - it is raised again where the future is asked
        future.set_exception(error)
    else:
        future.set_result(None)
