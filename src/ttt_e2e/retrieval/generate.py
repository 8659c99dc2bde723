"""Generating with passages of a notebook in the model's window, so that it sees exact words that it has read."""

from collections.abc import Iterable, Iterator
from typing import Any

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Session
from ttt_e2e.retrieval.notebook import Notebook
from ttt_e2e.retrieval.passages import Passage
from ttt_e2e.retrieval.search_index import with_parts

MAX_QUERY = 2000  # characters that are searched for: a search takes time by the number of words
MAX_PASSAGES, DEFAULT_PASSAGES = 20, 3  # that clients may have found, or put before a question


def generate_with_notebook(
    session: Session,
    notebook: Notebook,
    prompt: str,
    *,
    count: int = DEFAULT_PASSAGES,
    max_passage_tokens: int | None = None,
    learn: bool = False,
    **sampling: Any,
) -> tuple[Iterator[str], list[Passage]]:
    """Continue `prompt` with passages of the notebook that match it in the window.

    Args:
        session: It is read from, and not changed unless `sampling` says so.
        notebook: Searched for the words of the prompt.
        prompt: The text to continue.
        count: Passages at most.
        max_passage_tokens: Tokens of the passages at most; None is half the window.
        learn: Learn from passages and prompt, as `Session.generate` does from a prompt. Otherwise they are only in the
            window, and nothing learns from them, not even a fork.
        sampling: As for `Session.generate`.

    Returns:
        The text in chunks, and the passages that were put into the window.

    Raises:
        UserError: As `Session.generate` and `Notebook.search` do.
    """
    text, sources = retrieve(session, notebook, prompt, count, max_passage_tokens)
    reader = session
    if not learn:
        reader = session.fork()
        reader.learn = False
    return reader.generate(text, **sampling), sources


def retrieve(
    session: Session,
    notebook: Notebook,
    question: str,
    count: int = DEFAULT_PASSAGES,
    max_passage_tokens: int | None = None,
) -> tuple[str, list[Passage]]:
    """The question with passages before it that match it, or the end of a long one, and these passages.

    Arguments as above.
    """
    if session.tokenizer is None:
        raise UserError("Showing passages to a session needs a tokenizer; make the session with one.")
    if max_passage_tokens is None:
        max_passage_tokens = session.model.config.sliding_window // 2
    found = find_passages(notebook, question, count)
    return prompt_with_passages(question, found, session.tokenizer, max_passage_tokens)


def find_passages(notebook: Notebook, query: str, count: int = DEFAULT_PASSAGES) -> list[Passage]:
    """At most `count` passages that match `query`, or the end of a long one, the best first.

    Passages that share a part of a long run of characters without spaces are found as well; see `with_parts`. Raises
    UserError as `Notebook.search` does.
    """
    return notebook.search(with_parts(query[-MAX_QUERY:]), count)


def prompt_with_passages(
    question: str, passages: Iterable[Passage], tokenizer: Tokenizer, max_tokens: int
) -> tuple[str, list[Passage]]:
    """The question with passages before it, and the passages that were taken, in the order given.

    passages: the best first. In the prompt the best comes last, next to the question; each has its position in
    characters above it. max_tokens: of the text before the question; passages that do not fit are left out.
    """
    taken: list[Passage] = []
    before = "\n\n"
    for passage in passages:
        longer = f"\n\n[{passage.start}-{passage.stop}]\n{passage.text.strip()}{before}"
        if len(tokenizer.encode(longer)) <= max_tokens:
            taken.append(passage)
            before = longer
    return (before if taken else "") + question, taken
