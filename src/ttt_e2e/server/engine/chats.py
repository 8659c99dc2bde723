"""Where a conversation begins in a session."""

from collections.abc import Callable

from ttt_e2e.inference.session import Session
from ttt_e2e.server.engine.records import Before, Prompt


def begin_chat(session: Session, prompt: Callable[[Before], Prompt], tools: str = "") -> tuple[Session, Prompt]:
    """A copy of the session that counts as one with a conversation, and the prompt, which it has not read.

    prompt: gives the prompt of a conversation for what the session holds. Its ids for a session without a text begin
    that text, in place of BOS. tools: a digest of the functions that the prompt names, if they are new.
    """
    state = session.state()
    has_text = session.position + len(state.pending) > 1
    before: Before = "conversation" if state.text.chat else "text" if has_text else "nothing"
    if before == "conversation" and tools not in ("", state.text.tools):
        before = "other tools"
    given = prompt(before)
    pending = state.pending[:0] if before == "nothing" and not isinstance(given, str) else state.pending
    text = state.text._replace(chat=True, tools=tools or state.text.tools)
    return session.with_state(state._replace(text=text, pending=pending)), given
