"""Every accepted source and shape becomes rows; every other one is an error that names the fix."""

import json

import pytest
from datasets import Dataset

from expertmesh.data import hold_out, load_dataset
from expertmesh.data.formats import detect_format
from expertmesh.data.sources import Unreachable

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Readers cache under HF_HOME; tests get a cache of their own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("source", ["demo:chat", "demo:python", "demo:all"])
def test_the_built_in_sources_are_messages(source):
    assert load_dataset(source).column_names == ["messages"]


def test_several_sources_follow_one_another():
    both = load_dataset(["demo:chat", "demo:python"])
    assert len(both) == len(load_dataset("demo:chat")) + len(load_dataset("demo:python"))


def test_sources_of_different_shapes_do_not_mix(tmp_path):
    text = write(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match="must have the same columns: demo:chat has messages"):
        load_dataset(["demo:chat", text])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "abc", "url": "u"}, {"text": "abc"}),
        ({"messages": MESSAGES, "id": 1}, {"messages": MESSAGES}),
        ({"prompt": "p", "completion": "c", "n": 1}, {"prompt": "p", "completion": "c"}),
        (
            {"instruction": "add", "input": "1 2", "output": "3"},
            {"messages": [{"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"}]},
        ),
        (
            {"instruction": "add", "input": "", "output": "3", "system": "be brief"},
            {
                "messages": [
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": "add"},
                    {"role": "assistant", "content": "3"},
                ]
            },
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
            {"messages": MESSAGES},
        ),
        ({"conversations": MESSAGES}, {"messages": MESSAGES}),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]},
            {"messages": MESSAGES[:1]},
        ),
    ],
)
def test_each_shape_is_recognised_and_made_standard(tmp_path, row, expected):
    dataset = load_dataset(write(tmp_path / "data.jsonl", [row, row]))
    assert len(dataset) == 2 and dataset[0] == expected


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_texts_that_look_like_json_stay_texts_beside_other_shapes(tmp_path, ending):
    answers = ["0", "[1]", "true", '{"a": 1}', [{"type": "text", "text": "1e5"}]]
    rows = [{"messages": [MESSAGES[0], {"role": "assistant", "content": answer}]} for answer in answers]
    path = write(tmp_path / f"a.{ending}", rows)
    if ending == "json":
        (tmp_path / "a.json").write_text(json.dumps(rows))
    said = [row["messages"][1]["content"] for row in load_dataset(path)]
    assert said == [*answers[:4], "1e5"]


def test_a_call_of_a_tool_keeps_its_arguments(tmp_path):
    calls = [{"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    rows = [{"messages": [MESSAGES[0], {"role": "assistant", "tool_calls": calls}]}, {"messages": MESSAGES}]
    turn = load_dataset(write(tmp_path / "a.jsonl", rows))[0]["messages"][1]
    assert turn["content"] == "" and turn["tool_calls"] == calls


def test_a_split_that_a_file_does_not_have_is_an_error(tmp_path):
    assert "a file is all `train`" in error_of(write(tmp_path / "a.jsonl", [{"text": "x"}]), split="test")
    assert "a file is all `train`" in error_of("demo:chat", name="de")


@pytest.mark.parametrize(
    ("says", "role"),
    [("human", "user"), ("gpt", "assistant"), ("observation", "tool"), ("function_call", "assistant")]
    + [(role, role) for role in ("system", "developer", "user", "assistant", "tool")],
)
def test_every_speaker_of_sharegpt_has_its_role(tmp_path, says, role):
    rows = [{"conversations": [{"from": says, "value": "hi"}]}]
    assert load_dataset(write(tmp_path / "data.jsonl", rows))[0] == {"messages": [{"role": role, "content": "hi"}]}


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_what_a_chat_template_is_told_is_kept(tmp_path, column):
    told = {"tools": [{"name": "add"}], "chat_template_kwargs": {"enable_thinking": True}}
    dataset = load_dataset(write(tmp_path / "data.jsonl", [{column: MESSAGES, "id": 1} | told]))
    assert dataset[0] == {"messages": MESSAGES} | told


def test_a_hub_dataset_is_asked_for_by_configuration_and_split(monkeypatch):
    asked = []

    def read(*names, split):
        asked.append((*names, split))
        return Dataset.from_dict({"text": ["x"]})

    monkeypatch.setattr("datasets.load_dataset", read)
    load_dataset("org/rows", "test", name="main")
    load_dataset(["org/a", "org/b"], "test", name="main")
    assert asked == [("org/rows", "main", "test"), ("org/a", "main", "test"), ("org/b", "main", "test")]


def test_the_richest_shape_wins():
    assert detect_format(["text", "messages"]) == "messages"
    assert detect_format(["prompt", "text"]) == "text"
    assert detect_format(["prompt", "label"]) is None


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet", "arrow", "txt"])
def test_each_file_kind_is_read(tmp_path, ending):
    path, rows = tmp_path / f"data.{ending}", Dataset.from_dict({"text": ["one", "two"]})
    if ending in ("json", "jsonl"):
        write(path, rows)
    elif ending == "txt":
        path.write_text("one\n\ntwo\n")
    elif ending == "arrow":
        rows.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    else:
        getattr(rows, f"to_{ending}")(path)
    assert load_dataset(str(path))["text"][:] == ["one", "two"]


def test_a_folder_is_read_by_split_and_a_saved_dataset_as_it_is(tmp_path):
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", [{"text": "one"}])
    write(tmp_path / "files" / "test.jsonl", [{"text": "two"}])
    assert load_dataset(str(tmp_path / "files"), split="test")["text"][:] == ["two"]
    Dataset.from_dict({"text": ["three"]}).save_to_disk(tmp_path / "saved")
    assert load_dataset(str(tmp_path / "saved"))["text"][:] == ["three"]


def error_of(*args, **kwargs) -> str:
    """The text of the ValueError, which must be one paragraph."""
    with pytest.raises(ValueError) as caught:
        load_dataset(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_usable_column_names_the_columns_and_the_accepted_shapes(tmp_path):
    text = error_of(write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}]))
    for part in ("`question`", "`answer`", "`text`", "`messages`", "`prompt`", "alpaca", "sharegpt", "Rename"):
        assert part in text


def test_preference_data_is_told_where_it_belongs(tmp_path):
    assert "DPOTrainer" in error_of(write(tmp_path / "a.jsonl", [{"chosen": "q", "rejected": "a"}]))


def test_a_column_that_holds_something_else_is_an_error(tmp_path):
    assert "row 0 has a column `messages` that is no list of turns, but 'hi'" in error_of(
        write(tmp_path / "a.jsonl", [{"messages": "hi"}])
    )


def test_an_unknown_speaker_is_an_error_that_lists_the_known_ones(tmp_path):
    rows = [{"conversations": [{"from": "narrator", "value": "hi"}]}]
    assert "turn from 'narrator'. Rename it to one of human, gpt" in error_of(write(tmp_path / "a.jsonl", rows))


def test_a_missing_file_names_the_nearest_one(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "x"}])
    assert "Did you mean" in error_of(str(tmp_path / "trian.jsonl")) and "train.jsonl" in error_of(
        str(tmp_path / "trian.jsonl")
    )
    assert "Neither does the folder" in error_of(str(tmp_path / "nowhere" / "a.jsonl"))


def test_a_broken_an_empty_and_an_unknown_file_are_errors(tmp_path):
    broken, empty, unknown = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.docx"
    broken.write_text('{"text": "one"}\n{"text": \n')
    empty.touch()
    unknown.write_text("x")
    assert "cannot be read as jsonl" in error_of(str(broken)) and "Mend the file" in error_of(str(broken))
    assert "is empty" in error_of(str(empty))
    assert "Readable are .json, .jsonl" in error_of(str(unknown))


def test_an_empty_folder_and_a_missing_split_are_errors(tmp_path):
    assert "files of one kind" in error_of(str(tmp_path))
    write(tmp_path / "train.jsonl", [{"text": "x"}])
    assert "the split 'exam'" in error_of(str(tmp_path), split="exam")


def test_an_id_that_cannot_be_reached_says_what_to_do():
    text = error_of("nobody/nothing-of-that-name")
    assert "no file or folder here" in text and "demo:chat" in text


@pytest.mark.parametrize(
    ("error", "kind"), [(ConnectionError("all is dark"), Unreachable), (RuntimeError("that failed"), ValueError)]
)
def test_the_hub_is_unreachable_only_without_a_connection_and_the_deepest_cause_is_named(monkeypatch, error, kind):
    def load(*args, **kwargs):
        raise error from OSError("the deepest cause")

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(ValueError, match="failed: the deepest cause. Check") as found:
        load_dataset("someone/rows")
    assert type(found.value) is kind


def test_an_unknown_built_in_dataset_lists_the_known_ones():
    assert "demo:chat, demo:python" in error_of("demo:poetry")


def test_held_out_rows_share_no_question_with_training_rows():
    dataset = load_dataset("demo:chat")
    train, held_out = hold_out(dataset, 0.2, seed=1)
    assert len(train) + len(held_out) == len(dataset)
    assert 0.15 < len(held_out) / len(dataset) < 0.3
    questions = [{row["messages"][0]["content"] for row in part} for part in (train, held_out)]
    assert not questions[0] & questions[1]


TURN = {"role": "user", "content": "be brief"}


@pytest.mark.parametrize(
    "row",
    [
        lambda n: {"text": n},
        lambda n: {"prompt": n, "completion": "same"},
        lambda n: {"messages": [TURN | {"role": "system"}, TURN | {"content": n}, TURN]},
        lambda n: {"messages": [TURN | {"role": "assistant", "content": n}]},
    ],
    ids=["text", "prompt", "messages", "no question"],
)
def test_rows_are_told_apart_by_their_question_and_one_at_least_is_held_out(row):
    dataset = Dataset.from_list([row(str(number)) for number in range(20)])
    assert [len(part) for part in hold_out(dataset, 0.25)] == [15, 5]
    assert [len(part) for part in hold_out(dataset, 0.01)] == [19, 1]


def test_what_is_held_out_depends_on_the_seed_and_not_on_the_order():
    dataset = load_dataset("demo:chat")
    chosen = {str(row) for row in hold_out(dataset, 0.1)[1]}
    assert chosen == {str(row) for row in hold_out(dataset.shuffle(seed=5), 0.1)[1]}
    assert chosen != {str(row) for row in hold_out(dataset, 0.1, seed=1)[1]}


def test_nothing_left_to_train_on_is_an_error():
    same = Dataset.from_dict({"text": ["x", "x"]})
    with pytest.raises(ValueError, match="too few different rows"):
        hold_out(same, 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        hold_out(same, 1.0)


def test_text_that_is_not_utf8_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    assert "not UTF-8" in error_of(str(tmp_path / "a.txt"))
