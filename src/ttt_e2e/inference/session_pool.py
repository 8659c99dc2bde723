"""Many sessions on one model: they read and generate together, a row of a batch each, and join and leave at any time.

Each gives what it would give alone, up to rounding: sums run in another order. No row ever sees another's text.

Rows share a call if they take the same number of tokens and their states have the same shapes, wherever they are in
their texts: all with a full window do, and all whose mixers are recurrent. To generate, where nothing is learned, the
caches of a shorter text are padded in front.

When rows learn, the state after a mini-batch takes the memory of the one before it: moving what 16 texts have learned
would take longer than learning it. Now and then they are copied nevertheless, and the copy is the checkpoint that a
text returns to if it diverges: it reads again from there.

Shapes: B rows, T tokens, V vocabulary.
"""

import itertools
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from ttt_e2e.errors import UserError
from ttt_e2e.inference.divergence import Diverged, find_divergence, rolled_back_error
from ttt_e2e.inference.grammar import Matcher
from ttt_e2e.inference.pool_requests import (
    Checkpoint,
    Done,
    Event,
    Generation,
    Losses,
    PromptLogprobs,
    Sequence,
    Slot,
    Token,
)
from ttt_e2e.inference.row_batch import BatchedState, RowRef, compact, gather, ids_tensor, read_rows, single_row
from ttt_e2e.inference.sampling import SamplingOptions, TokenLogprob, check_max_tokens, token_logprob
from ttt_e2e.inference.session import Session, SessionState, check_token_ids
from ttt_e2e.inference.streaming import forward
from ttt_e2e.inference.text_digest import TextDigest

MAX_REPLAY = 64  # mini-batches that are learned in place, which a text that diverges has to read again


class SessionPool:
    """Sessions that share a model and its calls.

    Requests are submitted, and done in `step`; each session does its own in order. A step generates one token for every
    session that generates, in as many calls as that takes, and then makes one call to read, which includes the session
    that has waited longest. So nobody starves: a session that reads waits for at most as many steps as there are
    sessions that read, and one that generates for one reading call between two tokens.

    A new session is a copy of `template`. All sessions have its model, tokenizer, dtype and `learn`, and none is
    compiled. A call has at most `max_batch` rows; a CPU gains nothing beyond about 16.
    """

    def __init__(self, template: Session, *, max_batch: int = 16) -> None:
        if max_batch < 1:
            raise UserError(f"max_batch must be at least 1, not {max_batch}.")
        self.template, self.max_batch, self._model = template.fork(), max_batch, template.model
        self._mini_batch_size = template.mini_batch_size
        self._slots: dict[int, Slot] = {}
        self._ids = itertools.count()
        self._steps = 0

    @property
    def busy(self) -> bool:
        """Whether some request is not done yet."""
        return any(slot.job is not None or slot.queue for slot in self._slots.values())

    def add(self, session: Session | None = None) -> int:
        """Add a copy of a session, the template if None; returns its id, which is never used again.

        Raises UserError if it has another model, tokenizer, dtype or `learn` than the template.
        """
        session = session or self.template
        for name in ("model", "tokenizer", "dtype", "learn"):
            if getattr(session, name) is not getattr(self.template, name):
                raise UserError(f"The session has another {name} than the pool; make both with the same.")
        read_state, text, pending = session.state()
        id = next(self._ids)
        self._slots[id] = Slot(id, Sequence(single_row(read_state), text, pending))
        return id

    def peek(self, id: int) -> Session:
        """A copy of the session in its present state. Tokens of a read in progress that were not read yet are pending.

        Raises UserError for an unknown id.
        """
        own = self._slot(id).own
        return self._session(own.row, own.text, own.pending)

    def drop(self, id: int) -> None:
        """Remove a session, at any time, with all its requests. Raises UserError for an unknown id."""
        del self._slots[self._slot(id).id]

    def submit_read(self, id: int, tokens: np.ndarray | Iterable[int]) -> None:
        """Have a session read, as `Session.read` does. The events are `Losses`, one a mini-batch, then `Done`.

        Raises UserError for an unknown id, and for tokens outside of the vocabulary.
        """
        self._submit(id, check_token_ids(tokens, self._model.config.vocab_size))

    def submit_generate(
        self,
        id: int,
        prompt: np.ndarray | Iterable[int] = (),
        *,
        max_tokens: int = 200,
        options: SamplingOptions | None = None,
        learn_from_writing: bool = False,
        top_logprobs: int | None = None,
        score_prompt: bool = False,
        matcher: Matcher | None = None,
    ) -> None:
        """Have a session generate. The events are `Token`, one at a time, then `Done`.

        The session itself does not change: a copy reads the prompt, and learns from its full mini-batches. To keep what
        was generated, submit it as a read. For stop strings, look at the text and drop the session.

        Args:
            id: of the session.
            prompt: token ids to read first.
            max_tokens: how many tokens to generate at most; one that ends a text comes before.
            options: how tokens are drawn; default `SamplingOptions()`.
            learn_from_writing: whether the copy also learns from what it generates.
            top_logprobs: give every token its log-probability, and this many of the likeliest tokens in its place.
            score_prompt: with `top_logprobs`, `PromptLogprobs` come first, and have those of the prompt's tokens.
            matcher: the grammar of the text, which ends once it is complete. Only the pool may use it meanwhile.

        Raises:
            UserError: the id is unknown, a token is outside of the vocabulary, or `max_tokens` is negative.
        """
        check_max_tokens(max_tokens)
        ids = check_token_ids(prompt, self._model.config.vocab_size)
        options = options or SamplingOptions()
        check_token_ids(options.logit_bias.keys(), self._model.config.vocab_size)
        generator = torch.Generator().manual_seed(options.seed)
        learn = learn_from_writing and self.template.learn
        job = Generation(ids, max_tokens, options, learn, generator, top_logprobs=top_logprobs, matcher=matcher)
        if top_logprobs is not None and score_prompt:
            job.unscored = len(ids)
        if options.adjusts_logits:
            job.counts_V = torch.zeros(self._model.config.vocab_size, dtype=torch.int64)
        self._submit(id, job)

    def step(self) -> list[Event]:
        """Generate one token for every session that generates, and read one mini-batch of as many as share a call.

        Returns what happened; nothing if no session is busy. A row that goes wrong fails alone, with an error in its
        `Done`. An exception (such as too little memory) leaves all sessions as they were before the call that failed.
        """
        self._steps += 1
        events: list[Event] = []
        for slot in self._slots.values():
            self._advance_queue(slot, events)
        busy = [slot for slot in self._slots.values() if slot.job is not None]
        for batch in self._batches([slot for slot in busy if not self._must_read(slot.sequence)]):
            self._generate(batch, events)
        readers = [slot for slot in busy if self._must_read(slot.sequence)]
        if readers:
            self._read(min(self._batches(readers), key=lambda batch: min(s.waiting_since for s in batch)), events)
        self._compact()
        return events

    # -- requests ------------------------------------------------------------------------------------------------------

    def _slot(self, id: int) -> Slot:
        if id not in self._slots:
            raise UserError(f"There is no session {id} in this pool; it was removed, or never added.")
        return self._slots[id]

    def _submit(self, id: int, request: np.ndarray | Generation) -> None:
        slot = self._slot(id)
        if slot.job is None and not slot.queue:
            slot.waiting_since = self._steps
        slot.queue.append(request)

    def _advance_queue(self, slot: Slot, events: list[Event]) -> None:
        """End requests that have nothing left to do and begin the next ones, up to one that has."""
        while slot.job is not None or slot.queue:
            own = slot.own
            if slot.job is None:
                slot.job = slot.queue.popleft()
                if isinstance(slot.job, Generation):
                    pending = np.concatenate((own.pending, slot.job.prompt))
                    slot.job.sequence = Sequence(own.row, own.text, pending)
                else:
                    own.pending = np.concatenate((own.pending, slot.job))
            if isinstance(slot.job, Generation) and (slot.job.left > 0 or slot.job.unscored):
                if len(slot.job.sequence.pending) == 0:
                    self._fail(slot, UserError("There is no text to continue; give a prompt."), events)
                return
            if isinstance(slot.job, np.ndarray) and self._must_read(own):
                return
            slot.job = None
            events.append(Done(slot.id))

    def _fail(self, slot: Slot, error: UserError, events: list[Event]) -> None:
        slot.job = None
        slot.queue.clear()
        events.append(Done(slot.id, error))

    def _must_read(self, sequence: Sequence) -> bool:
        """Whether a full mini-batch is pending, and the token after it."""
        return len(sequence.pending) > self._mini_batch_size

    def _batches(self, slots: list[Slot]) -> list[list[Slot]]:
        """Slots in groups that can share a call of at most `max_batch` rows. Those of one state stay together."""
        states: dict[Any, list[Slot]] = {}
        for slot in slots:
            tokens = min(len(slot.sequence.pending), self._mini_batch_size + 1)
            states.setdefault((tokens, slot.sequence.row.batch), []).append(slot)
        batches: dict[Any, list[list[Slot]]] = {}
        for (tokens, state), some in states.items():
            some.sort(key=lambda slot: slot.sequence.row.row_index)
            # Caches in a call differ by less than a factor of two: a short text does not bear the cost of a long one.
            kind, cache_lengths = state.kind_and_cache_lengths
            lengths = tuple(length.bit_length() for length in cache_lengths)
            alike = state.shapes if tokens > self._mini_batch_size else (kind, lengths)
            open_batches = batches.setdefault((tokens, alike), [])
            room = next((batch for batch in open_batches if len(batch) + len(some) <= self.max_batch), None)
            if room is None:
                open_batches.append(some)
            else:
                room += some
        return [batch for open_batches in batches.values() for batch in open_batches]

    # -- reading -------------------------------------------------------------------------------------------------------

    def _read(self, slots: list[Slot], events: list[Event]) -> None:
        """Read a mini-batch of each slot. Every sequence changes last and at once, or not at all."""
        learn, b, sequences = self.template.learn, self._mini_batch_size, [slot.sequence for slot in slots]
        in_place = learn and self._may_overwrite(sequences)
        batch = gather([sequence.row for sequence in sequences], copy=learn and not in_place)
        options = {"learn": learn, "dtype": self.template.dtype, "donate_state": learn}
        ids = [sequence.pending[: b + 1] for sequence in sequences]
        logprobs: dict[int, list[TokenLogprob]] = {}  # by session; reading gives the losses only
        for slot, sequence, ids_T in zip(slots, sequences, ids, strict=True):
            if isinstance(slot.job, Generation) and slot.job.unscored > len(sequence.pending) - len(ids_T):
                one = ids_tensor(self._model, [ids_T[:-1]])
                logits_1TV, _ = forward(self._model, gather([sequence.row]).state, one, self.template.dtype)
                logprobs[slot.id] = slot.job.prompt_logprobs(ids_T, logits_1TV[0])
        try:
            after, losses_BT, norm_B = read_rows(self._model, batch.state, ids, **options)
            new = BatchedState(after, tuple(position + b for position in batch.positions))
            for i, (slot, sequence) in enumerate(zip(slots, sequences, strict=True)):
                slot.waiting_since = self._steps
                try:
                    self._check(sequence, losses_BT[i], norm_B[i], in_place)
                except Diverged as error:
                    self._fail(slot, error, events)
                    continue
                read, good = sequence.pending[:b], sequence.checkpoint if in_place else None
                if learn:
                    good = good or Checkpoint(sequence.row, sequence.text)
                    good = good._replace(read=(*good.read, read))
                sequence.text = sequence.text.add(read, b, self.template.token_sizes)
                sequence.row, sequence.pending, sequence.checkpoint = RowRef(new, i), sequence.pending[b:], good
                if sequence is slot.own:
                    events.append(Losses(slot.id, losses_BT[i]))
                if slot.id in logprobs and isinstance(slot.job, Generation):
                    slot.job.unscored -= len(logprobs[slot.id])
                    events.append(PromptLogprobs(slot.id, logprobs[slot.id]))
                self._advance_queue(slot, events)
        except KeyboardInterrupt:  # perhaps in the middle of an update
            for sequence in sequences:
                if in_place and sequence.row.batch is batch:
                    self._replay(sequence, 0)
            raise

    def _may_overwrite(self, sequences: list[Sequence]) -> bool:
        """Whether the sequences share a state that nothing else needs, and have checkpoints that are not too old."""
        batch = sequences[0].row.batch
        users = [row for sequence in self._sequences() for row in sequence.rows if row.batch is batch]
        whole = [sequence.row for sequence in sequences] == [RowRef(batch, i) for i in range(len(batch.positions))]
        recent = all(s.checkpoint is not None and len(s.checkpoint.read) < MAX_REPLAY for s in sequences)
        return whole and recent and len(users) == len(sequences)

    def _check(self, sequence: Sequence, losses: np.ndarray, norm: float, in_place: bool) -> None:
        """Return to the last good state and raise Diverged if a mini-batch shows that learning diverged."""
        position, vocab_size = sequence.row.position, self._model.config.vocab_size
        found = find_divergence(losses, norm, position, vocab_size, learns=self.template.learn)
        if found is None:
            return
        what, bad_update = found
        known = not bad_update or sequence.checkpoint is not None
        if in_place or (bad_update and known):
            self._replay(sequence, without=int(bad_update))
        sequence.checkpoint, sequence.pending = None, sequence.pending[:1]
        raise rolled_back_error(what, sequence.row.position, known)

    def _replay(self, sequence: Sequence, without: int) -> None:
        """Read again from the checkpoint on, without the last mini-batches."""
        assert sequence.checkpoint is not None
        row, text, read = sequence.checkpoint
        tokens = np.concatenate((*read, sequence.pending))
        session = self._session(row, text, tokens[: (len(read) - without) * self._mini_batch_size + 1])
        with suppress(Diverged):  # because of other rounding; the session is at its last good state then as well
            session.read(())
        read_state, sequence.text, _ = session.state()
        sequence.row, sequence.checkpoint = single_row(read_state), None
        sequence.pending = tokens[read_state.position - row.position :]

    def _session(self, row: RowRef, text: TextDigest, pending: np.ndarray) -> Session:
        return self.template.with_state(SessionState(gather([row], copy=True).state, text, pending.copy()))

    # -- generation ----------------------------------------------------------------------------------------------------

    def _generate(self, slots: list[Slot], events: list[Event]) -> None:
        """Generate a token for each slot."""
        sequences, tokenizer = [slot.sequence for slot in slots], self.template.tokenizer
        end_ids = () if tokenizer is None else tokenizer.end_ids
        batch = gather([sequence.row for sequence in sequences])
        ids_BT = ids_tensor(self._model, [sequence.pending for sequence in sequences])
        logits_BTV, after = forward(self._model, batch.state, ids_BT, self.template.dtype)
        new = BatchedState(after, tuple(position + ids_BT.shape[1] for position in batch.positions))
        logits_BV = logits_BTV[:, -1].float().cpu()
        is_finite = logits_BV.isfinite().all(1).tolist()
        for i, (slot, sequence) in enumerate(zip(slots, sequences, strict=True)):
            job = slot.job
            assert isinstance(job, Generation)
            if not is_finite[i] or (job.unscored and not logits_BTV[i].isfinite().all()):
                at = f"after {sequence.row.position} tokens"
                self._fail(slot, UserError(f"The model's logits {at} are not finite; nothing is generated."), events)
                continue
            if job.unscored:
                events.append(PromptLogprobs(slot.id, job.prompt_logprobs(sequence.pending, logits_BTV[i])))
                job.unscored = 0
                if job.left == 0:
                    self._advance_queue(slot, events)
                    continue
            try:
                token = job.draw(logits_BV[i], end_ids)
            except UserError as error:
                self._fail(slot, error, events)
                continue
            if token not in end_ids:
                top = job.top_logprobs
                events.append(Token(slot.id, token, None if top is None else token_logprob(logits_BV[i], token, top)))
            generated = np.array([token], np.int64)
            job.sequence = Sequence(RowRef(new, i), sequence.text, generated)
            if job.learn:
                job.border = job.border or sequence
                job.border.pending = np.concatenate((job.border.pending, generated))
                if self._must_read(job.border):
                    job.sequence, job.border = job.border, None
            self._advance_queue(slot, events)

    # -- memory --------------------------------------------------------------------------------------------------------

    def _sequences(self) -> set[Sequence]:
        slots = self._slots.values()
        return {s for slot in slots for s in (slot.own, slot.sequence, getattr(slot.job, "border", None)) if s}

    def _compact(self) -> None:
        """Copy rows out of states most of whose rows are not needed any more, so that the rest is freed."""
        sequences = self._sequences()
        copies = compact(row for sequence in sequences for row in sequence.rows)
        for sequence in sequences:
            sequence.row = copies.get(sequence.row, sequence.row)
            if good := sequence.checkpoint:
                sequence.checkpoint = good._replace(row=copies.get(good.row, good.row))
