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


def pieces(record: Mapping[str, Any], template: str, tokenizer: Any) -> list[Piece]:
    """Return a record as pieces; the last is always learned."""
    chat = template == "chat" or (template == "auto" and bool(getattr(tokenizer, "chat_template", None)))
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise JobError("task.causal_lm.template: chat needs a chat template, and this tokenizer has none; use plain")
    if "messages" in record:
        return _chat(record["messages"], tokenizer) if chat else _spoken(record["messages"])
    if "text" in record and not any(name in record for name in ANSWERS):
        return [Piece(record["text"], learned=True, ends=True)]
    asked, answer = prompt(record, template), record[ANSWERS[_kind(record)]]
    if chat:
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return _chat(turns, tokenizer)
    return [Piece(asked, learned=False), Piece(" " + answer, learned=True, ends=True)]


def _kind(record: Mapping[str, Any]) -> str:
    return next(name for name in ANSWERS if name in record and ANSWERS[name] in record)


def prompt(record: Mapping[str, Any], template: str) -> str:
    """Return what the model is asked."""
    kind = _kind(record)
    if template == "chat":
        return str(record[kind]) if not record.get("input") else f"{record[kind]}\n\n{record['input']}"
    if template in ("auto", "plain"):
        return PLAIN["input" if record.get("input") and kind == "instruction" else kind].format(**record)
    fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    if not fields:
        raise JobError("task.causal_lm.template: must be auto, chat, plain, or hold a {column} of the records")
    for field in fields:
        if field not in record:
            raise JobError(f"task.causal_lm.template: the records have no column `{field}`")
    return template.format(**{field: record[field] for field in fields})


def _spoken(messages: Sequence[Mapping[str, str]]) -> list[Piece]:
    """Write a dialogue in plain text: `User: ...`, `Assistant: ...`."""
    parts = []
    for message in messages:
        learned = message["role"] == "assistant"
        lead = "" if not parts else "\n"
        parts.append(Piece(f"{lead}{message['role'].capitalize()}:", learned=False))
        parts.append(Piece(" " + message["content"], learned=learned, ends=learned))
    return _until_last_answer(parts)


def _chat(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[Piece]:
    """Cut the text of a chat template at the borders of the assistant's turns."""
    parts, done = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(list(messages[:i]), tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(list(messages[: i + 1]), tokenize=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise JobError(
                "task.causal_lm.template: this tokenizer's chat template rewrites earlier turns, so the answer "
                "cannot be told from the prompt; use plain"
            )
        parts += [Piece(before[len(done) :], learned=False), Piece(after[len(before) :], learned=True)]
        done = after
    return parts


def _until_last_answer(parts: list[Piece]) -> list[Piece]:
    last = max(i for i, part in enumerate(parts) if part.learned)
    return parts[: last + 1]
