"""Records as pieces: what is learned, what is read, and where the borders are."""

from typing import Any

import pytest

from weft.core.errors import JobError
from weft.tasks.prompts import Piece, pieces
from weft.testing.tiny import tokenizer

JINJA = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PLAIN = tokenizer()
CHAT = tokenizer(JINJA)
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "so"},
    {"role": "user", "content": "thanks"},
]


def told(record: dict[str, Any], template: str = "auto", words: Any = PLAIN) -> list[tuple[str, bool, bool]]:
    return [(piece.text, piece.learned, piece.ends) for piece in pieces(record, template, words)]


@pytest.mark.parametrize(
    ("record", "asked", "answer"),
    [
        ({"question": "Why?", "answer": "So."}, "Question: Why?\nAnswer:", " So."),
        ({"instruction": "Add.", "output": "3"}, "Instruction: Add.\nResponse:", " 3"),
        ({"instruction": "Add.", "input": "", "output": "3"}, "Instruction: Add.\nResponse:", " 3"),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "Instruction: Add.\nInput: 1 2\nResponse:",
            " 3",
        ),
        ({"prompt": "Once", "completion": "upon"}, "Once", " upon"),
        ({"question": "Why?", "answer": "So.", "text": "other"}, "Question: Why?\nAnswer:", " So."),
    ],
)
def test_plain(record: dict[str, Any], asked: str, answer: str) -> None:
    assert told(record) == told(record, "plain") == [(asked, False, False), (answer, True, True)]


def test_text_is_learned_whole() -> None:
    assert told({"text": "Once upon a time"}) == [("Once upon a time", True, True)]


def test_the_jobs_own_template() -> None:
    record = {"question": "Why?", "answer": "So.", "source": "a book"}
    assert told(record, "{source} asks: {question}")[0] == ("a book asks: Why?", False, False)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("Q: {query}", "the records have no column `query`"),
        ("Answer!", "must be auto, chat, plain, or hold a {column}"),
        ("Q: {question", "write a brace that is text twice"),
        ("chat", "this tokenizer has none; use plain"),
    ],
)
def test_a_template_that_cannot_be_used(template: str, words: str) -> None:
    with pytest.raises(JobError) as caught:
        pieces({"question": "Why?", "answer": "So."}, template, PLAIN)
    assert str(caught.value).startswith("task.causal_lm.template: ")
    assert words in str(caught.value)


def test_braces_in_a_record_are_text() -> None:
    record = {"question": "What is {x}?", "answer": "{y}"}
    assert told(record)[0][0] == "Question: What is {x}?\nAnswer:"
    assert told(record, "Q {question}")[0][0] == "Q What is {x}?"


def test_a_chat_template_is_cut_at_the_answer() -> None:
    expected = [("[user]Why?;[assistant]", False, False), ("So.;", True, False)]
    assert told({"question": "Why?", "answer": "So."}, "chat", CHAT) == expected
    assert told({"prompt": "Why?", "completion": "So."}, "chat", CHAT) == expected


def test_auto_is_chat_where_the_tokenizer_has_a_template() -> None:
    record = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert told(record, "auto", CHAT) == told(record, "chat", CHAT)
    assert told(record, "auto", CHAT)[0][0] == "[user]Add.\n\n1 2;[assistant]"
    assert told(record, "plain", CHAT) == told(record, "plain", PLAIN)


def test_the_answer_alone_is_kept_beside_the_template_s_marks() -> None:
    last = pieces({"question": "Why?", "answer": "So."}, "chat", CHAT)[-1]
    assert last == Piece("So.;", learned=True, said="So.")


def test_every_answer_of_a_dialogue_is_learned() -> None:
    assert told({"messages": TURNS}, "chat", CHAT) == [
        ("[system]be brief;[user]hi;[assistant]", False, False),
        ("yes;", True, False),
        ("[user]why;[assistant]", False, False),
        ("so;", True, False),
    ]


def test_a_dialogue_in_plain_text_ends_with_the_last_answer() -> None:
    assert told({"messages": TURNS[1:]}) == [
        ("User:", False, False),
        (" hi", False, False),
        ("\nAssistant:", False, False),
        (" yes", True, True),
        ("\nUser:", False, False),
        (" why", False, False),
        ("\nAssistant:", False, False),
        (" so", True, True),
    ]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    shortening = tokenizer("{% for m in messages[-2:] %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}")
    with pytest.raises(JobError, match="rewrites earlier turns"):
        pieces({"messages": TURNS}, "chat", shortening)


def test_a_template_that_fails_is_named_and_the_record_is_not_quoted() -> None:
    strict = tokenizer("{% for m in messages %}{{ raise_exception('no ' + m['content']) }}{% endfor %}")
    with pytest.raises(JobError, match="refuses a record") as caught:
        pieces({"messages": TURNS}, "chat", strict)
    assert "brief" not in str(caught.value)
