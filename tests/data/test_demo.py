"""The built-in data: real, clean, the same every time."""

import subprocess
import sys

import pytest

from expertmesh.data.demo import LONGEST, MODULES, chat_dialogues, python_dialogues


def test_chat_dialogues_alternate_between_user_and_assistant():
    rows = chat_dialogues()
    assert len(rows) > 300
    for row in rows:
        roles = [turn["role"] for turn in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(turn["content"].strip() for turn in row["messages"])


def test_no_dialogue_of_demo_chat_claims_to_be_a_machine():
    text = "\n".join(turn["content"].lower() for row in chat_dialogues() for turn in row["messages"])
    for claim in (
        "i am a robot",
        "i'm a robot",
        "chat bot",
        "i'm software",
        "i am software",
        "my processor",
        "as an ai",
    ):
        assert claim not in text


def test_the_notice_of_the_corpus_is_shipped_beside_it():
    from importlib import resources

    notice = resources.files("expertmesh.data").joinpath("chat/LICENSE").read_text()
    assert "Copyright (c) 2017, Gunther Cox" in notice and "Redistributions in binary form" in notice


def test_python_dialogues_are_questions_answered_by_docstrings():
    rows = python_dialogues()
    assert len(rows) > 2000
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
    assert "Merge multiple sorted inputs into a single sorted output." in answers["What does `heapq.merge` do?"]
    assert "What is the class `statistics.groupby`?" not in answers, "names a module only imports are not its own"
    assert any(question.startswith("Explain the Python topic") for question in answers)
    for answer in answers.values():
        assert " at 0x" not in answer and len(answer) < LONGEST + 400


def test_every_module_of_demo_python_belongs_to_the_standard_library():
    assert {name.split(".")[0] for name in MODULES} <= sys.stdlib_module_names


def test_the_seed_alone_decides_the_order():
    assert python_dialogues(3) == python_dialogues(3)
    assert chat_dialogues(3) == chat_dialogues(3)
    assert chat_dialogues(3) != chat_dialogues(4)
    assert sorted(map(str, chat_dialogues(3))) == sorted(map(str, chat_dialogues(4)))


def test_another_process_makes_the_same_python_dialogues():
    import hashlib

    code = (
        "import hashlib; from expertmesh.data.demo import python_dialogues as p;"
        "print(hashlib.sha256(str(p()).encode()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": _src()})
    assert other.stdout.strip() == hashlib.sha256(str(python_dialogues()).encode()).hexdigest(), other.stderr


def test_stripped_docstrings_are_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr("expertmesh.data.demo._answer", lambda *_: None)
    monkeypatch.setattr("expertmesh.data.demo._topic_pairs", lambda: iter(()))
    with pytest.raises(ValueError, match="Run without -OO"):
        python_dialogues()


def _src() -> str:
    import expertmesh

    return str(next(iter(expertmesh.__path__))).removesuffix("/expertmesh")
