"""Many sessions on one model: they read and write together, a row of a batch each, and join and leave at any time.

Each gives what it would give alone, up to rounding: sums run in another order. No row ever sees another's text.

Rows share a call if they take the same number of tokens and their states have the same shapes, wherever they stand:
all whose window is full do, and all whose mixers are recurrent. Where nothing is learned, in writing, the keys and
values of a shorter text get empty slots in front. The rows of a call stay stacked in one state after it, and the same
rows go on from there without a copy; rows are copied only when one comes or goes.

Where rows learn, the state after a mini-batch takes the memory of the one before it: to move what 16 texts have learned
would take longer than to learn it. From time to time they are copied nevertheless, and the copy is where a text goes
back to if it goes wrong: it reads again from there.

Shapes: B rows, T tokens, V vocabulary.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ttt_e2e.errors import UserError
from ttt_e2e.inference.sampling import SamplingOptions, sample
from ttt_e2e.inference.session import Diverged, Session, SessionState, find_divergence, rolled_back_error, token_ids
from ttt_e2e.inference.streaming import ReadState, forward, read_mini_batch, stacked
from ttt_e2e.inference.text_digest import TextDigest
from ttt_e2e.model.mixers.attention import Cache


class Losses(NamedTuple):
    """The session `id` has read a mini-batch; its losses in nats, float32 [b]."""

    id: int
    losses: np.ndarray


class Token(NamedTuple):
    """The session `id` has written a token."""

    id: int
    token: int


class Done(NamedTuple):
    """What was submitted first to the session `id` is done.

    error: None, or why it failed. What was submitted to the session after it is then dropped.
    """

    id: int
    error: UserError | None = None


Event = Losses | Token | Done

_REPLAY = 64
"""How many mini-batches are read in place, and so are read again at most by a text that went wrong."""


@dataclass(frozen=True, eq=False)
class _Stack:
    """Rows that went through a call together.

    positions: those of `state`, row by row, known without asking a GPU. shapes: what states must have in common to be
    read together. loose: to be written on together.
    """

    state: ReadState
    positions: tuple[int, ...]
    shapes: tuple[Any, ...]
    loose: tuple[Any, ...]


class _Row(NamedTuple):
    """The state of one text: a row of a stack. A value, as every state is."""

    stack: _Stack
    at: int

    @property
    def position(self) -> int:
        return self.stack.positions[self.at]


class _Good(NamedTuple):
    """Where a text stood when its loss was good, and the tokens that were read from there on, in pieces."""

    row: _Row
    text: TextDigest
    read: tuple[np.ndarray, ...] = ()


@dataclass(eq=False)
class _Run:
    """A text that goes on, a session's own or the copy that is written on."""

    row: _Row
    text: TextDigest
    pending: np.ndarray
    good: _Good | None = None

    @property
    def rows(self) -> list[_Row]:
        return [self.row] if self.good is None else [self.row, self.good.row]


class _Write(NamedTuple):
    prompt: np.ndarray
    max_tokens: int
    options: SamplingOptions
    learn: bool


@dataclass(eq=False)
class _Writing:
    """A `_Write` at work: the copy of the session that it writes on, and how many tokens are still to come.

    border: where it learns from what it writes, the copy after the last whole mini-batch, with all tokens since then
    pending; None where `run` stands there itself.
    """

    work: _Write
    run: _Run
    left: int
    generator: torch.Generator
    border: _Run | None = None


@dataclass(eq=False)
class _Member:
    """A session. job: what it is at (a read is its tokens); jobs: what comes then. waiting: since that step."""

    id: int
    own: _Run
    jobs: deque[np.ndarray | _Write] = field(default_factory=deque)
    job: np.ndarray | _Writing | None = None
    waiting: int = 0

    @property
    def run(self) -> _Run:
        return self.job.run if isinstance(self.job, _Writing) else self.own


class SessionPool:
    """Sessions that share a model, and calls to it.

    fresh: what a new session begins as; it stays as it is. All have its model, tokenizer, dtype and kind of learning,
    and none is compiled. max_batch: rows of a call at most, 1 or more; beyond some 16 a CPU gains nothing.

    Work is submitted and done in `step`. A session does what was submitted to it in that order. A step writes one token
    for everyone who writes, in as many calls as that takes, and then makes one call of reading, with the session in it
    that has waited longest. So nobody starves: a reader waits for at most as many steps as there are readers, and a
    writer for one call of reading between two tokens.
    """

    def __init__(self, fresh: Session, *, max_batch: int = 16) -> None:
        if max_batch < 1:
            raise UserError(f"A pool needs calls of at least one row, not max_batch={max_batch}; give 1 or more.")
        self.fresh = fresh.fork()
        self.max_batch = max_batch
        self._members: dict[int, _Member] = {}
        self._ids = itertools.count()
        self._steps = 0

    @property
    def piece(self) -> int:
        """Tokens that a session reads at once: a mini-batch. Where nothing is learned, one alone takes several."""
        return self.fresh.mini_batch

    @property
    def busy(self) -> bool:
        """Whether something submitted is not done yet."""
        return any(member.job is not None or member.jobs for member in self._members.values())

    def __len__(self) -> int:
        return len(self._members)

    def add(self, session: Session | None = None) -> int:
        """Let a session join, a fresh one if None; returns its id, which no other session of this pool ever has.

        The given one stays as it is. Raises UserError if it has another model, tokenizer, dtype or kind of learning.
        """
        session = session or self.fresh
        for name in ("model", "tokenizer", "dtype", "learn"):
            if getattr(session, name) is not getattr(self.fresh, name):
                raise UserError(f"A session can only join a pool of its own {name}; make both with the same.")
        state, text, pending = session.standing()
        id = next(self._ids)
        self._members[id] = _Member(id, _Run(_Row(_stack(state, (state.position,)), 0), text, pending))
        return id

    def remove(self, id: int) -> Session:
        """Let a session leave, at any time; returns it as it stands.

        Tokens of the read at work that are not read yet come along as pending. Writing at work ends, and what was
        submitted after the work at hand is dropped. Raises UserError for an id that is not here.
        """
        session = self.peek(id)
        self.drop(id)
        return session

    def peek(self, id: int) -> Session:
        """The session as it stands now, as `remove` gives it, with the same error; the one in the pool goes on."""
        run = self._member(id).own
        return self._session(run.row, run.text, run.pending)

    def drop(self, id: int) -> None:
        """Let a session leave that nobody needs any more. Raises UserError for an id that is not here."""
        del self._members[self._member(id).id]

    def submit_read(self, id: int, tokens: np.ndarray | Iterable[int]) -> None:
        """Have the session read on, as `Session.read` does; the events are `Losses`, one a mini-batch, then `Done`.

        Raises UserError for an id that is not here, and for tokens outside of the vocabulary.
        """
        self._submit(id, token_ids(tokens, self.fresh.model.config.vocab_size))

    def submit_generate(
        self,
        id: int,
        prompt: np.ndarray | Iterable[int] = (),
        *,
        max_tokens: int = 200,
        options: SamplingOptions | None = None,
        learn_from_writing: bool = False,
    ) -> None:
        """Have the session written on after `prompt`; the events are `Token`, one at a time, then `Done`.

        It ends after `max_tokens`, or with a token that ends a text. The session itself stays as it is: a copy reads
        the prompt, and learns from its whole mini-batches, but not from what it writes unless `learn_from_writing`. To
        keep what was written, submit it as a read. options: default `SamplingOptions()`. For stop strings, look at the
        text and `cancel`. Raises UserError for an id that is not here, tokens outside of the vocabulary and a negative
        number.
        """
        if max_tokens < 0:
            raise UserError(f"Cannot write {max_tokens} tokens; max_tokens must be 0 or more.")
        ids, learn = token_ids(prompt, self.fresh.model.config.vocab_size), learn_from_writing and self.fresh.learn
        self._submit(id, _Write(ids, max_tokens, options or SamplingOptions(), learn))

    def cancel(self, id: int) -> None:
        """End what the session is at, without a `Done`, and drop what was submitted after it.

        Tokens of a read at work that are not read yet stay pending. Raises UserError for an id that is not here.
        """
        member = self._member(id)
        member.job = None
        member.jobs.clear()

    def step(self) -> list[Event]:
        """Advance: one token for everyone who writes, and one mini-batch for as many readers as share a call.

        Returns what happened, nothing if nobody is busy. A row that goes wrong fails alone, with an error in its
        `Done`. An exception (such as too little memory) leaves everyone as they were before the call that failed.
        """
        self._steps += 1
        events: list[Event] = []
        for member in self._members.values():
            self._settle(member, events)
        busy = [member for member in self._members.values() if member.job is not None]
        writers = [member for member in busy if len(member.run.pending) <= self.piece]
        for call in self._calls(writers):
            self._write(call, events)
        readers = [member for member in busy if len(member.run.pending) > self.piece]
        if readers:
            self._read(min(self._calls(readers), key=lambda call: min(member.waiting for member in call)), events)
        self._let_go()
        return events

    # -- work ------------------------------------------------------------------------------------------------------

    def _member(self, id: int) -> _Member:
        if id not in self._members:
            raise UserError(f"There is no session {id} in this pool; it was removed, or never added.")
        return self._members[id]

    def _submit(self, id: int, job: np.ndarray | _Write) -> None:
        member = self._member(id)
        if member.job is None and not member.jobs:
            member.waiting = self._steps
        member.jobs.append(job)

    def _session(self, row: _Row, text: TextDigest, pending: np.ndarray) -> Session:
        state = _alone(row).stack.state._replace(position_offsets_B=None)
        return self.fresh.standing_at(SessionState(state, text, pending.copy()))

    def _runs(self) -> set[_Run]:
        members = self._members.values()
        return {run for m in members for run in (m.own, m.run, getattr(m.job, "border", None)) if run is not None}

    def _settle(self, member: _Member, events: list[Event]) -> None:
        """End jobs that have no work left and begin those that come next, up to one that has work."""
        while member.job is not None or member.jobs:
            run = member.own
            if member.job is None:
                job = member.jobs.popleft()
                if isinstance(job, np.ndarray):
                    member.job = job
                    run.pending = np.concatenate((run.pending, job))
                else:
                    copy = _Run(run.row, run.text, np.concatenate((run.pending, job.prompt)))
                    generator = torch.Generator().manual_seed(job.options.seed)
                    member.job = _Writing(job, copy, job.max_tokens, generator)
            if isinstance(member.job, _Writing):
                if member.job.left > 0:
                    if len(member.job.run.pending) == 0:
                        self._fail(member, UserError("There is nothing to go on from; give a prompt."), events)
                    return
            elif len(run.pending) > self.piece:
                return
            member.job = None
            events.append(Done(member.id))

    def _fail(self, member: _Member, error: UserError, events: list[Event]) -> None:
        member.job = None
        member.jobs.clear()
        events.append(Done(member.id, error))

    def _calls(self, members: list[_Member]) -> list[list[_Member]]:
        """Members in groups that can share a call of at most `max_batch` rows. Those of one stack stay together."""
        stacks: dict[Any, list[_Member]] = {}
        for member in members:
            tokens = min(len(member.run.pending), self.piece + 1)
            stacks.setdefault((tokens, member.run.row.stack), []).append(member)
        calls: dict[Any, list[list[_Member]]] = {}
        for (tokens, stack), some in stacks.items():
            some.sort(key=lambda member: member.run.row.at)
            alike = calls.setdefault((tokens, stack.shapes if tokens > self.piece else stack.loose), [])
            room = next((call for call in alike if len(call) + len(some) <= self.max_batch), None)
            if room is None:
                alike.append(some)
            else:
                room += some
        return [call for alike in calls.values() for call in alike]

    def _read(self, members: list[_Member], events: list[Event]) -> None:
        """A mini-batch for each of the members; each one's state changes last and at once, or not at all."""
        learn, runs = self.fresh.learn, [member.run for member in members]
        in_place = learn and self._may_overwrite(runs)
        stack = _gathered([run.row for run in runs], copy=learn and not in_place)
        try:
            self._read_stack(members, stack, in_place, events)
        except KeyboardInterrupt:  # maybe amid an update
            for run in runs:
                if in_place and run.row.stack is stack:
                    self._go_back(run, 0)
            raise

    def _read_stack(self, members: list[_Member], stack: _Stack, in_place: bool, events: list[Event]) -> None:
        """`stack`: the members' runs; in_place: it is their own, and no copy."""
        fresh, piece, runs = self.fresh, self.piece, [member.run for member in members]
        ids_BT = self._tensor([run.pending[: piece + 1] for run in runs])
        after, nll_BT, norm_B = read_mini_batch(
            fresh.model,
            stack.state,
            ids_BT[:, :-1],
            ids_BT[:, 1:],
            learn=fresh.learn,
            dtype=fresh.dtype,
            in_place=fresh.learn,
        )
        new = _stack(after, tuple(position + piece for position in stack.positions))
        losses, norms = nll_BT.float().cpu().numpy(), norm_B.tolist()
        for i, (member, run) in enumerate(zip(members, runs, strict=True)):
            member.waiting = self._steps
            error = self._judge(run, losses[i], norms[i], in_place)
            if error is not None:
                self._fail(member, error, events)
                continue
            good = None
            if fresh.learn:
                good = run.good if in_place and run.good is not None else _Good(run.row, run.text)
                good = good._replace(read=(*good.read, run.pending[:piece]))
            text = run.text.add(run.pending[:piece], piece, fresh.token_sizes)
            run.row, run.text, run.pending, run.good = _Row(new, i), text, run.pending[piece:], good
            if run is member.own:
                events.append(Losses(member.id, losses[i]))
            self._settle(member, events)

    def _may_overwrite(self, runs: list[_Run]) -> bool:
        """Whether the state of these runs is their own alone, and how to come back to it is known."""
        stack = runs[0].row.stack
        users = [row for run in self._runs() for row in run.rows if row.stack is stack]
        whole = [run.row for run in runs] == [_Row(stack, at) for at in range(len(stack.positions))]
        known = all(run.good is not None and len(run.good.read) < _REPLAY for run in runs)
        return whole and known and len(users) == len(runs)

    def _judge(self, run: _Run, losses: np.ndarray, norm: float, in_place: bool) -> Diverged | None:
        """What is wrong with a mini-batch, as in `Session`; the run is then back at its last good state."""
        first = run.row.position
        try:
            found = find_divergence(
                losses, norm, first, self.fresh.learn and first > 0, self.fresh.model.config.vocab_size
            )
        except Diverged as error:
            return error
        if found is None:
            return None
        what, update = found
        known = not update or run.good is not None
        if in_place or (update and known):
            self._go_back(run, 1 if update else 0)
        run.good, run.pending = None, run.pending[:1]
        return rolled_back_error(what, run.row.position, known)

    def _go_back(self, run: _Run, mini_batches: int) -> None:
        """Take back so many mini-batches that were read: read again, from where the run was good, what came before."""
        assert run.good is not None
        row, text, read = run.good
        tokens = np.concatenate((*read, run.pending))
        session = self._session(row, text, tokens[: (len(read) - mini_batches) * self.piece + 1])
        with suppress(Diverged):  # by another rounding; it is at its last good state then as well
            session.read(())
        state, run.text, _ = session.standing()
        run.row, run.pending = _Row(_stack(state, (state.position,)), 0), tokens[state.position - row.position :]
        run.good = None

    def _write(self, members: list[_Member], events: list[Event]) -> None:
        """A token for each of the members."""
        tokenizer, runs = self.fresh.tokenizer, [member.run for member in members]
        stack = _gathered([run.row for run in runs])
        ids_BT = self._tensor([run.pending for run in runs])
        logits_BTV, after = forward(self.fresh.model, stack.state, ids_BT, self.fresh.dtype)
        new = _stack(after, tuple(position + ids_BT.shape[1] for position in stack.positions))
        logits_BV = logits_BTV[:, -1].float().cpu()
        sound = logits_BV.isfinite().all(1).tolist()
        for i, (member, run) in enumerate(zip(members, runs, strict=True)):
            job = member.job
            assert isinstance(job, _Writing)
            if not sound[i]:
                message = f"The model's logits after {run.row.position} tokens are not finite; nothing can be written."
                self._fail(member, UserError(message), events)
                continue
            token = sample(logits_BV[i], job.work.options, job.generator)
            if tokenizer is not None and token in tokenizer.ends:
                job.left = 0
            else:
                job.left -= 1
                events.append(Token(member.id, token))
            written = np.array([token], np.int64)
            job.run = _Run(_Row(new, i), run.text, written)
            if job.work.learn:
                job.border = job.border or run
                job.border.pending = np.concatenate((job.border.pending, written))
                if len(job.border.pending) > self.piece:  # a whole mini-batch: to be read, with the token left over
                    job.run, job.border = job.border, None
            self._settle(member, events)

    def _tensor(self, rows: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(rows)).to(self.fresh.model.embedding.device)

    def _let_go(self) -> None:
        """Copy rows out of stacks most of whose rows nobody needs any more, so that the rest is freed."""
        runs = self._runs()
        needed: dict[_Stack, set[int]] = {}
        for run in runs:
            for row in run.rows:
                needed.setdefault(row.stack, set()).add(row.at)
        alone: dict[_Row, _Row] = {}
        for stack, indices in needed.items():
            if 2 * len(indices) < len(stack.positions):
                alone |= {_Row(stack, i): _alone(_Row(stack, i)) for i in indices}
        for run in runs:
            run.row = alone.get(run.row, run.row)
            if run.good is not None:
                run.good = run.good._replace(row=alone.get(run.good.row, run.good.row))


# -- stacks ------------------------------------------------------------------------------------------------------------


def _stack(state: ReadState, positions: tuple[int, ...]) -> _Stack:
    values = (*(state.static or ()), *state.loop.fast, *state.loop.caches)
    shapes = tuple(tuple(t.shape[1:]) for value in values for t in value)
    # Caches in a call differ by less than a factor of two: a short text is not written on at the cost of a long one.
    slots = tuple(value.k_BGSK.shape[2].bit_length() for value in values if isinstance(value, Cache))
    others = tuple(tuple(t.shape[1:]) for value in values if not isinstance(value, Cache) for t in value)
    return _Stack(state, positions, shapes, (slots, others))


def _alone(row: _Row) -> _Row:
    """A copy of the row, as the only one of a stack."""
    stack, at = row
    return _Row(_stack(stacked([stack.state], [at], [row.position]), (row.position,)), 0)


def _gathered(rows: Sequence[_Row], copy: bool = False) -> _Stack:
    """Rows in one stack, in their order: the stack they are in if they are all of it, else or if wanted a copy."""
    first = rows[0].stack
    if not copy and list(rows) == [_Row(first, at) for at in range(len(first.positions))]:
        return first
    positions = tuple(row.position for row in rows)
    return _stack(stacked([row.stack.state for row in rows], [row.at for row in rows], positions), positions)
