"""How a text begins in a session: a conversation, or the ids of a whole text."""

from ttt_e2e.inference.session import Session
from ttt_e2e.server.engine.records import Before, ChatPrompt, Prompt


def begin_chat(session: Session, prompt: ChatPrompt, tools: str = "") -> tuple[Session, Prompt]:
    """A copy of the session that is marked as holding a conversation, and the prompt, which it has not read yet.

    Args:
        session: may hold a conversation already.
        prompt: returns the prompt, given what the session holds. If it returns ids for an empty session, they are the
            whole text, and replace the session's BOS.
        tools: a digest of the functions that the prompt names; "" for none.
    """
    state = session.state()
    before: Before = "conversation" if state.text.chat else "text" if num_tokens(session) > 1 else "nothing"
    if before == "conversation" and tools not in ("", state.text.tools):
        before = "other tools"
    given = prompt(before)
    text = state.text._replace(chat=True, tools=tools or state.text.tools)
    session = session.with_state(state._replace(text=text))
    return without_bos(session) if before == "nothing" and not isinstance(given, str) else session, given


def without_bos(session: Session) -> Session:
    """The session without the BOS that begins it, if it has read nothing else."""
    state = session.state()
    return session if num_tokens(session) > 1 else session.with_state(state._replace(pending=state.pending[:0]))


def num_tokens(session: Session) -> int:
    """How many tokens the session has been given, BOS and those that wait for a full mini-batch among them."""
    return session.position + len(session.state().pending)
