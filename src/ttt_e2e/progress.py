"""Progress bars."""

import time

from tqdm import tqdm


class ProgressBar(tqdm):
    """A bar of tqdm by a clock that only goes forward: its own bars stop while the system's clock is set back."""

    @property
    def _time(self):  # type: ignore[no-untyped-def]
        return time.monotonic

    @_time.setter
    def _time(self, clock: object) -> None:
        """Which tqdm sets to `time.time`."""
