"""The end of a reading: a command that is stopped after it has saved does not read its text twice when it is repeated.

That could happen where a session continues in its own file: finished, the file looks like one that is to read the text.
So what was read and the report are noted in the lock file of the session (see `files.lock_beside`) before the session
is saved. The lock file goes as the command succeeds; where it is found, the command that left it had not.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import IO, Any

from ttt_e2e.reading.report import ReadingReport, SegmentLoss


class EndedReading:
    """What the lock file of a session, `lock`, says or will say of a reading of the text `chunks`, with `options`.

    options: what else decides the session that is saved, as plain values.
    """

    def __init__(self, lock: IO[str], chunks: Iterable[str], options: Any) -> None:
        self._lock, self._source, self._options = lock, iter(chunks), options
        self._hash = hashlib.sha256()

    def chunks(self) -> Iterator[str]:
        """The text, which must be read to its end before `note`."""
        for chunk in self._source:
            self._hash.update(chunk.encode("utf-8", "surrogatepass"))
            yield chunk

    def find(self, session_digest: str) -> ReadingReport | None:
        """The report of this reading, if it has been saved to the session whose text has this digest."""
        try:
            found = json.loads(self._lock.read())
            if (found["session"], found["options"]) != (session_digest, self._options):
                return None
            report = found["report"]
            segments = {name: [SegmentLoss(**one) for one in report[name]] for name in ("parts", "curve")}
            ended = ReadingReport(**report | segments)
        except (ValueError, KeyError, TypeError):  # nothing was noted, or not all of it
            return None
        # The whole text is kept here, in case that it is another one.
        chunks = list(self._source)
        self._source = iter(chunks)
        whole = hashlib.sha256("".join(chunks).encode("utf-8", "surrogatepass")).hexdigest()
        return ended if whole == found["text"] else None

    def note(self, session_digest: str, report: ReadingReport) -> None:
        """Note the report before the session, whose text has this digest, is saved."""
        self._lock.seek(0)
        self._lock.truncate()
        digests = {"text": self._hash.hexdigest(), "session": session_digest}
        json.dump({**digests, "options": self._options, "report": asdict(report)}, self._lock)
        self._lock.flush()
