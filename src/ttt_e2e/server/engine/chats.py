"""Where a conversation begins in a session."""

from collections.abc import Callable

from ttt_e2e.inference.session import Session
from ttt_e2e.server.engine.records import Before, Prompt


def begin_chat(session: Session, prompt: Callable[[Before], Prompt]) -> tuple[Session, Prompt]:
    """A copy of the session that counts as one with a conversation, and the prompt, which it has not read.

    prompt: gives the prompt of a conversation for what the session holds. Its ids for a session without a text begin
    that text, in place of BOS.
    """
    state = session.state()
    has_text = session.position + len(state.pending) > 1
    before: Before = "conversation" if state.text.chat else "text" if has_text else "nothing"
    given = prompt(before)
    pending = state.pending[:0] if before == "nothing" and not isinstance(given, str) else state.pending
    return session.with_state(state._replace(text=state.text._replace(chat=True), pending=pending)), given
