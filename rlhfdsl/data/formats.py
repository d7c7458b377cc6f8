"""From the rows of a source to prompts, answers and texts, whatever columns and notation they came in.

| format     | columns                                       | each cell                 |
|------------|-----------------------------------------------|---------------------------|
| preference | chosen, rejected, and prompt if there is one   | text or messages          |
| chat       | messages                                      | messages, or text with hh |
| prompt     | prompt                                        | text or messages          |
| text       | text                                          | text                      |

Text is one turn, of the user in a prompt and of the assistant in an answer. `turns = hh` splits it into
turns.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhfdsl.data import codes
from rlhfdsl.data.sources import Source, kind_of
from rlhfdsl.language.diagnostics import UserError

Message = dict[str, str]
Messages = tuple[Message, ...]

# What a stage can read from a format. Plain text has no answer to tell apart, so only `loss = all` reads it
# as chat.
READS = {
    "preference": ("preference", "chat", "prompt", "text"),
    "chat": ("chat", "prompt", "text"),
    "prompt": ("prompt",),
    "text": ("text",),
}

_NEEDED = {
    "preference": ("chosen", "rejected"),
    "chat": ("messages",),
    "prompt": ("prompt",),
    "text": ("text",),
}

# Names that other data sets have for the same column, for the suggestion in an error.
_OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "context"),
    "chosen": ("response_chosen", "better", "good", "accepted", "answer", "completion"),
    "rejected": ("response_rejected", "worse", "bad"),
    "messages": ("conversations", "conversation", "dialog", "dialogue", "chat"),
    "text": ("content", "document", "body", "story"),
}

_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row in the form that every reader takes.

    place: where it came from. key: the hash of its prompt, which decides the part.
    prompt: the messages before the answer; empty for plain text.
    chosen: the answer (of a chat: the last one), None when there is none. rejected: of a pair only.
    text: of plain text only.
    """

    place: str
    key: str
    prompt: Messages = ()
    chosen: str | None = None
    rejected: str | None = None
    text: str | None = None

    @property
    def rank(self) -> int:
        """A hash of all that the row says: it decides which rows a blend's share takes first."""
        said = json.dumps([self.key, self.chosen, self.rejected])
        return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big")


def parse(source: Source, entry: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of a source by the `format`, `turns` and `columns` of its entry in the plan.

    Raises UserError for a missing column and for a cell or message that is not what the format says.
    """
    parser = _Parser(source, entry)
    parser.check_columns()
    read = {
        "preference": parser.preference,
        "chat": parser.chat,
        "prompt": parser.prompt,
        "text": parser.text,
    }[entry["format"]]
    for number, cells in source.rows:
        yield read(number, cells)


def key_of(prompt: Sequence[Message] | str) -> str:
    """The hash (sha256, hex) of a prompt. Blanks around a turn do not count, nor does the notation."""
    if isinstance(prompt, str):
        canonical = prompt.strip()
    else:
        turns = [[message["role"], message["content"].strip()] for message in prompt]
        canonical = json.dumps(turns, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def split_turns(text: str) -> list[Message] | None:
    """The messages of a text with "\\n\\nHuman:" and "\\n\\nAssistant:" turns; None if it begins with none.

    Blanks around a turn are dropped. Two turns of one speaker in a row become one, since chat templates
    insist on alternation. An opened turn at the end that says nothing is kept, as an empty message.
    """
    pieces = _TURN.split(text)
    if pieces[0].strip() or len(pieces) == 1:
        return None
    messages: list[Message] = []
    for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True):
        role, content = _ROLES[speaker], content.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{content}".strip()
        else:
            messages.append({"role": role, "content": content})
    return messages


@dataclass(frozen=True, slots=True)
class _Parser:
    """Reads the cells of one source. Every method's `number` is that of the row, for errors."""

    source: Source
    entry: Mapping[str, Any]

    @property
    def hh(self) -> bool:
        return self.entry["turns"] == "hh"

    def column(self, name: str) -> str:
        return self.entry["columns"].get(name, name)

    def error(self, code: str, message: str, number: int, help: str, setting: str = "from") -> UserError:
        at = f"{self.source.address}.{setting}"
        return UserError(code, message, at=at, place=self.source.place(number), help=help)

    def check_columns(self) -> None:
        known = _NEEDED[self.entry["format"]]
        known = ("prompt", *known) if self.entry["format"] == "preference" else known
        for name in self.entry["columns"]:
            if name not in known:
                raise UserError(
                    codes.COLUMN_MISSING,
                    f"the format {self.entry['format']} has no `{name}`",
                    at=f"{self.source.address}.columns.{name}",
                    place=self.source.name,
                    help=f"it has {', '.join(known)}",
                )
        wanted = dict.fromkeys((*_NEEDED[self.entry["format"]], *self.entry["columns"]))
        absent = [name for name in wanted if self.column(name) not in self.source.columns]
        if not absent:
            return
        there = self.source.columns
        listed = ", ".join(f"`{name}`" for name in there)
        pairs = ", ".join(f'{name} = "{_likely(name, there)}"' for name in absent)
        named = " and no ".join(f"column `{self.column(name)}`" for name in absent)
        mapped = next((name for name in absent if name in self.entry["columns"]), None)
        raise UserError(
            codes.COLUMN_MISSING,
            f"`{self.source.name}` has no {named}; it has {listed}",
            at=f"{self.source.address}.columns.{mapped}" if mapped else f"{self.source.address}.format",
            place=self.source.name,
            help=f"say which column it is: columns {{ {pairs} }}",
        )

    def preference(self, number: int, cells: Mapping[str, Any]) -> Row:
        chosen, rejected = self.cell(number, cells, "chosen"), self.cell(number, cells, "rejected")
        if self.has_prompt(number, cells):
            prompt = self.as_prompt(number, self.cell(number, cells, "prompt"))
            one = self.after_prompt(number, "chosen", prompt, chosen)
            other = self.after_prompt(number, "rejected", prompt, rejected)
        else:
            ours = self.as_dialogue(number, "chosen", chosen)
            theirs = self.as_dialogue(number, "rejected", rejected)
            cut = _fork(ours, theirs)
            prompt, one, other = tuple(ours[:cut]), _content(ours, cut), _content(theirs, cut)
        return Row(self.source.place(number), key_of(prompt), prompt, one, other)

    def chat(self, number: int, cells: Mapping[str, Any]) -> Row:
        messages = self.as_dialogue(number, "messages", self.cell(number, cells, "messages"))
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
        prompt = tuple(messages if last is None else messages[:last])
        chosen = None if last is None else messages[last]["content"]
        return Row(self.source.place(number), key_of(prompt), prompt, chosen)

    def prompt(self, number: int, cells: Mapping[str, Any]) -> Row:
        prompt = self.as_prompt(number, self.cell(number, cells, "prompt"))
        return Row(self.source.place(number), key_of(prompt), prompt)

    def text(self, number: int, cells: Mapping[str, Any]) -> Row:
        text = self.cell(number, cells, "text")
        if not isinstance(text, str):
            raise self.not_text(number, "text", text)
        return Row(self.source.place(number), key_of(text), text=text)

    def has_prompt(self, number: int, cells: Mapping[str, Any]) -> bool:
        column = self.column("prompt")
        if column in self.source.columns:
            return True
        if column in cells:
            raise self.error(
                codes.CELL,
                f"this row has a `{column}`, and the first row has none",
                number,
                f"give every row a `{column}`, or none",
            )
        return False

    def cell(self, number: int, cells: Mapping[str, Any], name: str) -> Any:
        column = self.column(name)
        value = cells.get(column)
        if value is None:
            state = "is null" if column in cells else "is missing"
            raise self.error(codes.CELL, f"`{column}` {state}", number, "fill it in, or leave the row out")
        if not isinstance(value, str | list):
            raise self.not_text(number, name, value)
        return value

    def not_text(self, number: int, name: str, value: Any) -> UserError:
        wanted = "text" if self.entry["format"] == "text" else "text or messages"
        return self.error(
            codes.CELL,
            f"`{self.column(name)}` is {kind_of(value)}, not {wanted}",
            number,
            "write it in quotes" if isinstance(value, int | float) else f"make it {wanted}",
        )

    def as_prompt(self, number: int, value: str | list) -> Messages:
        """A prompt cell. With hh, the opening of the answer at its end is not part of it."""
        if isinstance(value, list):
            return tuple(self.messages(number, "prompt", value))
        if not self.hh:
            return ({"role": "user", "content": value},)
        messages = split_turns(value)
        if messages is None:
            if value.strip():
                raise self.no_turns(number, "prompt")
            return ()
        if messages[-1] == {"role": "assistant", "content": ""}:
            messages.pop()
        return tuple(messages)

    def after_prompt(self, number: int, name: str, prompt: Messages, value: str | list) -> str:
        """The answer in a cell beside a prompt: it alone, or in the dialogue that begins with the prompt."""
        if isinstance(value, str):
            if not self.hh:
                return value
            messages = split_turns(value) or split_turns(f"\n\nAssistant: {value}") or []
        else:
            messages = self.messages(number, name, value)
        start = len(prompt) if _same(messages[: len(prompt)], prompt) else 0
        answer = messages[start : start + 1]
        if answer and answer[0]["role"] == "assistant":
            return answer[0]["content"]
        raise self.error(
            codes.MESSAGES,
            f"`{self.column(name)}` neither begins with the prompt nor is an answer of the assistant",
            number,
            "give the assistant's message alone, or the whole conversation with the prompt's messages first",
        )

    def as_dialogue(self, number: int, name: str, value: str | list) -> list[Message]:
        """A cell that holds a whole conversation."""
        if isinstance(value, list):
            return self.messages(number, name, value)
        if not self.hh:
            column = self.column(name)
            pair = name != "messages"
            if _TURN.match(value):
                help = 'the text has "Human:" turns: write turns = hh'
            elif pair:
                rest = [
                    c
                    for c in self.source.columns
                    if c not in (self.column("chosen"), self.column("rejected"))
                ]
                likely = rest[0] if len(rest) == 1 else _likely("prompt", rest)
                help = f'name the column of the prompt: columns {{ prompt = "{likely}" }}'
            else:
                help = 'give a list of {"role": …, "content": …}'
            raise self.error(
                codes.NO_PROMPT if pair else codes.CELL,
                f"`{column}` is text, {'and nothing says where its prompt ends' if pair else 'not messages'}",
                number,
                help,
                "format",
            )
        messages = split_turns(value)
        if messages is None:
            raise self.no_turns(number, name)
        return messages

    def no_turns(self, number: int, name: str) -> UserError:
        return self.error(
            codes.TURNS,
            f'`{self.column(name)}` does not begin with a turn "\\n\\nHuman:"',
            number,
            "leave `turns` out, or mend the row",
            "turns",
        )

    def messages(self, number: int, name: str, value: list) -> list[Message]:
        """Messages as {"role", "content"}, or in the other usual spelling {"from": "human", "value"}."""
        column = self.column(name)
        found = []
        for count, item in enumerate(value, 1):
            if not isinstance(item, dict) or not (
                {"role", "content"} <= set(item) or {"from", "value"} <= set(item)
            ):
                what = "an object without role and content" if isinstance(item, dict) else kind_of(item)
                raise self.error(
                    codes.MESSAGES,
                    f"item {count} of `{column}` is {what}",
                    number,
                    'a message is {"role": "user", "content": "…"}',
                )
            role = item["role"] if "role" in item else item["from"]
            content = item["content"] if "content" in item else item["value"]
            role = {"human": "user", "gpt": "assistant"}.get(role, role) if isinstance(role, str) else role
            if role not in ("system", "user", "assistant"):
                raise self.error(
                    codes.MESSAGES,
                    f"message {count} of `{column}` has the role {json.dumps(role, default=str)}",
                    number,
                    "the roles are system, user and assistant; leave out rows with other turns, such as a tool's",
                )
            if isinstance(content, list) and all(
                isinstance(p, dict) and p.get("type") == "text" for p in content
            ):
                content = "".join(part.get("text") or "" for part in content)
            if not isinstance(content, str):
                raise self.error(
                    codes.MESSAGES,
                    f"the content of message {count} of `{column}` is {kind_of(content)}, not text",
                    number,
                    "only text can be read; leave out rows in which a tool is called or an image is shown",
                )
            found.append({"role": role, "content": content})
        return found


def _fork(one: Sequence[Message], other: Sequence[Message]) -> int:
    """Where two dialogues fork: the last assistant turn of both with all before it in common, else 0."""
    cut = 0
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a["role"] == b["role"] == "assistant":
            cut = i
        if not _same([a], [b]):
            break
    return cut


def _content(messages: Sequence[Message], i: int) -> str:
    return messages[i]["content"] if i < len(messages) and messages[i]["role"] == "assistant" else ""


def _same(one: Sequence[Message], other: Sequence[Message]) -> bool:
    return len(one) == len(other) and all(
        a["role"] == b["role"] and a["content"].strip() == b["content"].strip()
        for a, b in zip(one, other, strict=True)
    )


def _likely(name: str, columns: Sequence[str]) -> str:
    """The column that `name` may be, or an ellipsis."""
    lowered = {column.lower(): column for column in columns}
    for guess in (name, *_OTHER_NAMES.get(name, ())):
        if guess in lowered:
            return lowered[guess]
    near = difflib.get_close_matches(name, list(lowered), n=1) or [word for word in lowered if word.startswith(name)]
    return lowered[near[0]] if near else "…"
