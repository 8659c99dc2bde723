"""Blocks of code that are under way, and waiting for the last of them."""

import asyncio


class Usage:
    """Entered by each block that is counted: `with usage: ...`."""

    def __init__(self) -> None:
        self.count = 0
        self._unused = asyncio.Event()
        self._unused.set()

    def __enter__(self) -> None:
        self.count += 1
        self._unused.clear()

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if not self.count:
            self._unused.set()

    async def wait_until_unused(self) -> None:
        """Wait until no block is under way."""
        await self._unused.wait()
