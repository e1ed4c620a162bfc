"""Records as pieces of text, each to be learned or only read: chat templates, a plain one, or the job's own."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.core.errors import JobError

PLAIN = {
    "question": "Question: {question}\nAnswer:",
    "instruction": "Instruction: {instruction}\nResponse:",
    "input": "Instruction: {instruction}\nInput: {input}\nResponse:",
    "prompt": "{prompt}",
}
ANSWERS = {"question": "answer", "instruction": "output", "prompt": "completion"}


@dataclass(frozen=True)
class Piece:
    """A run of text; `learned`: the loss counts it; `ends`: the end-of-sequence token follows."""

    text: str
    learned: bool
    ends: bool = False
    said: str | None = None
    """The answer alone, where the text also holds a chat template's marks."""


def pieces(record: Mapping[str, Any], template: str, tokenizer: Any, task: str = "causal_lm") -> list[Piece]:
    """Return a record as pieces; the last is always learned. Errors name the template of this task."""
    try:
        return _pieces(record, template, tokenizer)
    except JobError as error:
        raise JobError(f"task.{task}.{error}") from None


def _pieces(record: Mapping[str, Any], template: str, tokenizer: Any) -> list[Piece]:
    chat = template == "chat" or (template == "auto" and bool(getattr(tokenizer, "chat_template", None)))
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise JobError("template: chat needs a chat template, and this tokenizer has none; use plain")
    kind = _kind(record)
    if kind is None and isinstance(record.get("messages"), list):
        return _chat(record["messages"], tokenizer) if chat else _spoken(record["messages"])
    if kind is None:
        return [Piece(record["text"], learned=True, ends=True)]
    asked, answer = prompt(record, kind, "chat" if chat else template), record[ANSWERS[kind]]
    if chat:
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return _chat(turns, tokenizer)
    return [Piece(asked, learned=False), Piece(" " + answer, learned=True, ends=True)]


def _kind(record: Mapping[str, Any]) -> str | None:
    """Return the first kind of question that the record holds whole, None for a dialogue or a text."""
    return next((name for name in ANSWERS if _filled(record, name) and _filled(record, ANSWERS[name])), None)


def _filled(record: Mapping[str, Any], name: str) -> bool:
    return isinstance(record.get(name), str) and bool(record[name].strip())


def prompt(record: Mapping[str, Any], kind: str, template: str) -> str:
    """Return what the model is asked; raise JobError that begins with the key, `template: `."""
    if template == "chat":
        return str(record[kind]) if not record.get("input") else f"{record[kind]}\n\n{record['input']}"
    if template in ("auto", "plain"):
        return PLAIN["input" if record.get("input") and kind == "instruction" else kind].format(**record)
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise JobError(f"template: {error}; write a brace that is text twice, as {{{{") from None
    if not fields:
        raise JobError("template: must be auto, chat, plain, or hold a {column} of the records")
    for field in fields:
        if field not in record:
            raise JobError(f"template: the records have no column `{field}`")
    return template.format(**{field: record[field] for field in fields})


def _spoken(messages: Sequence[Mapping[str, str]]) -> list[Piece]:
    """Write a dialogue in plain text: `User: ...`, `Assistant: ...`."""
    parts: list[Piece] = []
    for message in messages:
        learned = message["role"] == "assistant"
        lead = "" if not parts else "\n"
        parts.append(Piece(f"{lead}{message['role'].capitalize()}:", learned=False))
        parts.append(Piece(" " + message["content"], learned=learned, ends=learned))
    return _until_last_answer(parts)


def _chat(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[Piece]:
    """Cut the text of a chat template at the borders of the assistant's turns."""
    parts: list[Piece] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _written(tokenizer, messages[:i], add_generation_prompt=True)
        after = _written(tokenizer, messages[: i + 1])
        if not (before.startswith(done) and after.startswith(before)):
            raise JobError(
                "template: this tokenizer's chat template rewrites earlier turns, so the answer "
                "cannot be told from the prompt; use plain"
            )
        parts.append(Piece(before[len(done) :], learned=False))
        parts.append(Piece(after[len(before) :], learned=True, said=message["content"]))
        done = after
    return parts


def _written(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except Exception:  # jinja's, whose text may quote the record
        raise JobError(
            "template: this tokenizer's chat template refuses a record, perhaps its system message "
            "or two questions in a row; use plain"
        ) from None


def _until_last_answer(parts: list[Piece]) -> list[Piece]:
    last = max(i for i, part in enumerate(parts) if part.learned)
    return parts[: last + 1]
