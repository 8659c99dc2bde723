"""What a notebook costs the service: disk, processor time and memory for a long text.

    python benchmarks/notebook_cost.py BOOKS.txt              # a text of about 10 MB

Recording is all that happens before the model reads. A search opens the notebook and checks its index, as the service
does for each question; a few more words are recorded in a copy.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ttt_e2e.data.text import text_chunks
from ttt_e2e.retrieval.notebook import Notebook
from ttt_e2e.server.engine.notebooks import Limits, NotebookText, make_notebook


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Print the processor time of the block, and how far it raised the peak of memory."""
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(f"{what}: {1000 * (time.process_time() - start):,.0f} ms of processor time, {grown:.1f} MiB more memory")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--passage-size", type=int, default=192, help="characters (default: the shipped model's 192)")
    arguments = parser.parse_args()
    limits = Limits(arguments.passage_size, 1 << 30)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first"), Path(folder, "second")
        with measured("recording"):
            made = make_notebook(first, limits, [NotebookText("books", text_chunks(arguments.file))])
        with measured("searching"), Notebook(first, create=False) as notebook:
            notebook.search("the prince and the whale", 3)
        with measured("recording a few words more"):
            make_notebook(second, limits, [NotebookText("more", ["A few words."])], (first, made.record))
    print(f"{made.record.text_bytes / 1e6:.2f} MB of text, {made.record.bytes / 1e6:.2f} MB on the disk")


if __name__ == "__main__":
    main()
