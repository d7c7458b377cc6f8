"""From rows to token ids and the flags that say which of them are learned.

The text of a conversation is what the chat template writes. It is cut where an answer begins and ends, and
each piece is tokenised alone and without special tokens, so that a rollout sees the ids of a prompt that
training saw.

    template(messages, with the opening of an answer)  = the prompt
    template(messages and answer)                      = the prompt, then the answer

An answer ends with its first stop id, which is learned; what the template writes after it is not. Where the
template writes none after the last answer, it is appended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rlhfdsl.data import codes
from rlhfdsl.data.formats import Message, Row
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.models.tokenizers import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DROPPED = ("empty", "too_long", "tie", "no_answer")


@dataclass(frozen=True, slots=True)
class Item:
    """A tokenised row: one sequence, or chosen and rejected of a pair. Ids and loss flags have equal lengths.

    text: the rendered prompt, when only the prompt is read. Its one sequence has no loss.
    """

    sequences: tuple[tuple[list[int], list[bool]], ...]
    truncated: bool
    text: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """An answer and the text between it and the one before; `exact` if nothing but the answer is in it."""

    before: str
    answer: str
    exact: bool


@dataclass(frozen=True, slots=True)
class Renderer:
    """How the rows of one edge are rendered.

    model: address of the model whose tokenizer this is. stops: the ids that end an answer, the one to append
    first. length: the most tokens of a sequence; overlong: whether a longer one is cut or dropped; loss:
    answer or all. Every method gives an Item for each row, or the reason (one of DROPPED) why there is none.
    """

    model: str
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]
    length: int
    overlong: str
    loss: str | None

    def chats(self, rows: Sequence[Row], every_turn: bool) -> list[Item | str]:
        """Conversations; the last answer is learned, and with `every_turn` those before it too."""
        found: list[Item | str] = [_chat_fault(row, every_turn) for row in rows]
        kept = [i for i, fault in enumerate(found) if not fault]
        dialogues = {i: [*rows[i].prompt, _assistant(rows[i].chosen)] for i in kept}
        turns = [(i, turn) for i in kept for turn in _answers(dialogues[i], every_turn)]
        places = [rows[i].place for i, _ in turns]
        heads = self.texts([dialogues[i][:turn] for i, turn in turns], True, places)
        fulls = self.texts([dialogues[i][: turn + 1] for i, turn in turns], False, places)
        pieces: dict[int, list[Piece]] = {}
        for i, group in groupby(range(len(turns)), key=lambda n: turns[n][0]):
            own = list(group)
            texts = [heads[n] for n in own], [fulls[n] for n in own]
            pieces[i] = self.cut(*texts, rows[i].place)
        ids = iter(
            self.tokens([text for row in pieces.values() for p in row for text in (p.before, p.answer)])
        )
        for i, row in pieces.items():
            sequence: tuple[list[int], list[bool]] = ([], [])
            for piece in row:
                before, answer = next(ids), next(ids)
                end = self.end_of(answer)
                if piece is row[-1]:
                    answer = self.closed(answer, end)
                    end = len(answer)
                elif end is None:
                    if not piece.exact:
                        raise self.rewritten(rows[i].place)
                    end = len(answer)
                sequence[0].extend(before + answer)
                sequence[1].extend([False] * len(before) + [True] * end + [False] * (len(answer) - end))
            found[i] = self.fitted(*sequence)
        return found

    def cut(self, heads: Sequence[str], fulls: Sequence[str], place: str) -> list[Piece]:
        """Cut a conversation at its answers.

        heads, fulls: for each answer, the text of what comes before it, and of that with the answer. The
        last of `fulls` is the whole conversation.
        """
        whole, done, pieces = fulls[-1], 0, []
        for n, head in enumerate(heads):
            if not whole.startswith(head) or len(head) < done:
                raise self.rewritten(place)
            until, exact = len(whole), True
            if n + 1 < len(heads):
                # Some templates write an earlier answer otherwise than the last one (they take its reasoning
                # out). Then the answer is looked for in all that stands before the next one, and ends at its
                # stop id.
                exact = fulls[n].startswith(head) and heads[n + 1].startswith(fulls[n])
                until = len(fulls[n] if exact else heads[n + 1])
            pieces.append(Piece(whole[done : len(head)], whole[len(head) : until], exact))
            done = until
        return pieces

    def pairs(self, rows: Sequence[Row]) -> list[Item | str]:
        """Pairs of sequences that share their prompt. Answers that are equal, or cut to be, are a tie."""
        found: list[Item | str] = [_chat_fault(row, False) or _pair_fault(row) for row in rows]
        kept = [i for i, fault in enumerate(found) if not fault]
        places = [rows[i].place for i in kept]
        heads = self.texts([rows[i].prompt for i in kept], True, places)
        answers = []
        for name in ("chosen", "rejected"):
            dialogues = [[*rows[i].prompt, _assistant(getattr(rows[i], name))] for i in kept]
            for head, full, place in zip(heads, self.texts(dialogues, False, places), places, strict=True):
                if not full.startswith(head):
                    raise self.rewritten(place)
                answers.append(full[len(head) :])
        ids = self.tokens(heads + answers)
        n = len(kept)
        for k, i in enumerate(kept):
            head = ids[k]
            two = [self.closed(answer, self.end_of(answer)) for answer in (ids[n + k], ids[2 * n + k])]
            items = [self.fitted(head + answer, [False] * len(head) + [True] * len(answer)) for answer in two]
            reason = next((item for item in items if isinstance(item, str)), None)
            if reason:
                found[i] = reason
            elif items[0].sequences[0][0] == items[1].sequences[0][0]:
                found[i] = "tie"
            else:
                both = (items[0].sequences[0], items[1].sequences[0])
                found[i] = Item(both, items[0].truncated or items[1].truncated)
        return found

    def prompts(self, rows: Sequence[Row]) -> list[Item | str]:
        """Prompts, with the opening of the answer. A long one keeps its end when it is cut."""
        found: list[Item | str] = ["" if _says_something(row.prompt) else "empty" for row in rows]
        kept = [i for i, fault in enumerate(found) if not fault]
        texts = self.texts([rows[i].prompt for i in kept], True, [rows[i].place for i in kept])
        for i, text, ids in zip(kept, texts, self.tokens(texts), strict=True):
            long = len(ids) > self.length
            if long and self.overlong == "drop":
                found[i] = "too_long"
            else:
                found[i] = Item(((ids[-self.length :], [False] * min(len(ids), self.length)),), long, text)
        return found

    def plain(self, rows: Sequence[Row]) -> list[Item | str]:
        """Plain text, all of it learned, with the tokenizer's own special tokens, closed by a stop id."""
        found: list[Item | str] = ["" if row.text.strip() else "empty" for row in rows]
        kept = [i for i, fault in enumerate(found) if not fault]
        for i, ids in zip(kept, self.tokens([rows[i].text for i in kept], special=True), strict=True):
            if self.stops and not set(ids[-1:]) & set(self.stops):
                ids = [*ids, self.stops[0]]
            found[i] = self.fitted(ids, [True] * len(ids))
        return found

    def texts(
        self, conversations: Sequence[Sequence[Message]], generation: bool, places: Sequence[str]
    ) -> list[str]:
        """The text of each conversation. Raises UserError for the first that the template refuses."""
        if not conversations:
            return []
        try:
            return render(self.tokenizer, conversations, generation=generation)
        except Exception as error:  # a template may fail in any way that Python can
            for conversation, place in zip(conversations, places, strict=True):
                try:
                    render(self.tokenizer, [conversation], generation=generation)
                except Exception as refusal:
                    raise UserError(
                        codes.TEMPLATE,
                        f"the chat template of {self.model} refuses this conversation: {refusal}",
                        at=f"{self.model}.template",
                        place=place,
                        help="mend the row, or write template = human_assistant in the model",
                    ) from refusal
            raise error

    def rewritten(self, place: str) -> UserError:
        return UserError(
            codes.NOT_A_CONTINUATION,
            f"the chat template of {self.model} changes the text of the prompt when the answer is added, so "
            "the two cannot be told apart",
            at=f"{self.model}.template",
            place=place,
            help="write template = human_assistant in the model",
        )

    def tokens(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """The ids of each text, from one call."""
        if not texts:
            return []
        return self.tokenizer(
            list(texts),
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def end_of(self, answer: Sequence[int]) -> int | None:
        """How many tokens an answer has up to and with its first stop id."""
        return next((i + 1 for i, token in enumerate(answer) if token in self.stops), None)

    def closed(self, answer: list[int], end: int | None) -> list[int]:
        """The answer up to its stop id, which is appended where there is none."""
        return answer[:end] if end is not None else [*answer, *self.stops[:1]]

    def fitted(self, ids: list[int], loss: list[bool]) -> Item | str:
        """A sequence within the length. The first token is never a target: nothing comes before it."""
        long = len(ids) > self.length
        if long and self.overlong == "drop":
            return "too_long"
        ids, loss = ids[: self.length], loss[: self.length]
        if self.loss == "all":
            loss = [True] * len(ids)
        loss[:1] = [False]
        return Item(((ids, loss),), long) if any(loss) else "no_answer"


def _chat_fault(row: Row, every_turn: bool) -> str:
    if not _says_something(row.prompt):
        return "empty"
    if row.chosen is None:
        return "no_answer"
    earlier = [m["content"] for m in row.prompt if m["role"] == "assistant"] if every_turn else []
    return "" if all(answer.strip() for answer in (*earlier, row.chosen)) else "empty"


def _pair_fault(row: Row) -> str:
    if not row.rejected.strip():
        return "empty"
    return "tie" if row.chosen.strip() == row.rejected.strip() else ""


def _says_something(prompt: Sequence[Message]) -> bool:
    return any(message["content"].strip() for message in prompt if message["role"] != "system")


def _answers(dialogue: Sequence[Message], every_turn: bool) -> list[int]:
    """The turns that are answers. One that opens the conversation answers nothing and is read as context."""
    last = len(dialogue) - 1
    if not every_turn:
        return [last]
    asked = next(i for i, message in enumerate(dialogue) if message["role"] == "user" or i == last)
    return [i for i in range(asked, last + 1) if dialogue[i]["role"] == "assistant"]


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
