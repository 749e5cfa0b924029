"""What is wrong with a run is said before its model is loaded, and by `--dry-run`: one paragraph, exit code 2.

All cases run in this process, most of them by `--dry-run` alone; what it finds, a run finds by the same call.
"""

import contextlib
import io
import json
import shutil

import pytest
import yaml

from expertmesh import cli
from tests.train.runs import checkpoint, data_file, rows, tiny_run

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]}
PART = {"type": "text", "text": "hello"}
#: a template that knows tools, roles of its own, and what the assistant says
TEMPLATE = """{% for m in messages %}{% if m.role == 'narrator' %}Once: {% endif %}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments }}){% endfor %}
{%- endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"""


def said_by(arguments, code):
    """(stdout, stderr) of one command line in this process, which ends with `code` and without a traceback."""
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()) as out:
        found = cli.run(["train", *arguments])
    assert "Traceback" not in errors.getvalue() and found == code, errors.getvalue()
    return out.getvalue(), errors.getvalue()


@pytest.fixture
def dry(tmp_path, monkeypatch):
    """Looks at a tiny run, changed so, and returns what is said; exit code 0 or 2 as wanted."""
    monkeypatch.delenv("EXPERTMESH_DEBUG", raising=False)

    def look(code=2, **changes):
        settings = tiny_run(tmp_path / "run", **{"data__max_length": 64} | changes)
        settings = [word for word in settings if not word.startswith("data.eval_fraction")]
        _, said = said_by([*settings, "--dry-run"], code)
        paragraphs = [line for line in said.splitlines() if line.startswith("expertmesh: error: ")]
        assert len(paragraphs) == (code != 0), said
        assert not (tmp_path / "run").exists()
        return paragraphs[0] if paragraphs else said

    return look


def data(folder, *lines, of=8):
    """`of` good conversations, and these rows."""
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows(of), *lines]))
    return path


def model(folder, remove=(), **config):
    """The tiny model, with other values in its config.json and without some files."""
    shutil.rmtree(folder / "model", ignore_errors=True)
    made = shutil.copytree(checkpoint(), folder / "model")
    (made / "config.json").write_text(json.dumps(json.loads((made / "config.json").read_text()) | config))
    for name in remove:
        (made / name).unlink()
    return made


def talk(*turns, **more):
    return {"messages": list(turns), **more}


#: (key=value, words of the answer)
VALUES = [
    ("train.seed=-1", "`train.seed` cannot be -1"),
    ("train.seed=4294967296", "`train.seed` cannot be 4294967296"),
    ("train.warmup_steps=.inf", "finite"),
    ("train.warmup_steps=-1", "`train.warmup_steps` cannot be -1"),
    ("train.learning_rate=.nan", "finite"),
    ("train.max_grad_norm=-.inf", "finite"),
    ("train.num_train_epochs=1e300", "`train.num_train_epochs`"),
    ("train.max_steps=true", "`train.max_steps` cannot be True: a number is wanted"),
    ("train.max_steps=1" + "0" * 5000, "not valid YAML"),
    ("train.optim=adam_of_eden", "train.optim: there is no 'adam_of_eden'"),
    ("train.optim=adamw_torch_fuse", "did you mean 'adamw_torch_fused'"),
    ("train.optim=adamw_bnb_8bit", "bitsandbytes"),
    ("train.optim=lomo", "train.optim: lomo cannot be used here"),
    ("train.optim_states=4bit", "'8bit', '24bit' or 'float32'"),
    ("train.optim_states=24bit", "Set model.dtype=bfloat16, or take 8bit"),
    ("train.lr_scheduler_type=cosinus", "did you mean 'cosine'"),
    ("train.lr_scheduler_type=warmup_stable_decay", "train.lr_scheduler_type: warmup_stable_decay needs"),
    ("train.lr_scheduler_type=reduce_lr_on_plateau", "set log.eval_steps"),
    ("train.lr_scheduler_type=cosine_with_min_lr", "min_lr"),
    ("log.report_to=wandbb", "did you mean 'wandb'"),
    ("log.report_to=[tensorboard, abacus]", "log.report_to: there is no 'abacus'"),
    ("parallel.nproc=1000000", "`parallel.nproc`"),
    ("model.dtype=float17", "'auto', 'float32' or 'bfloat16'"),
    ("model.dtype=float16", "'auto', 'float32' or 'bfloat16'"),
    ("model.attn_implementation=fancy", "model.attn_implementation"),
    ("model.attn_implementation=flash_attention_2", "model.attn_implementation"),
    ("model.fused={no_such: true}", "There is no fusion 'no_such'"),
    ("model.name=''", "`model.name` cannot be ''"),
    ("model.name=123", "Quote it"),
    ('data.name="a\\0b"', "`data.name` cannot be"),
    ("data.name=[]", "`data.name` cannot be []"),
    ("data.name={a: 1}", "`data.name` cannot be"),
    ("data.name=/dev/zero", "neither a file nor a folder"),
    ("data.name=demo:poetry", "demo:chat"),
    ("data.name=" + "a" * 300 + ".jsonl", "data.name"),
    ("data.split=exam", "a file is all `train`"),
    ("data.eval_split=test", "a file is all `train`"),
    ("data.config=de", "a file is all `train`"),
    ("data.max_length=129", "more than the 128 positions"),
    ("lora={target_modules: [no_proj]}", "lora.target_modules"),
    ("lora={target_parameters: [experts.no_proj]}", "no parameter was matched"),
    ("lora={target_modules: [q_proj, no_proj]}", "lora.target_modules: no_proj matched nothing"),
    (
        "lora={target_parameters: [experts.down_proj, experts.no_proj]}",
        "lora.target_parameters: experts.no_proj matched",
    ),
    ("lora={target_modules: []}", "`lora.target_modules`"),
    ("save.output_dir=/proc/run", "nothing can be written in /proc"),
    ("save.output_dir=''", "`save.output_dir` cannot be ''"),
    ("save.resume_from_checkpoint=nowhere", "save.resume_from_checkpoint: nowhere is no checkpoint"),
    ("train.lr=1", "did you mean `train.learning_rate`?"),
    ("train.batch_size=1", "did you mean `train.per_device_train_batch_size`?"),
    ("train.use_cpu=true", "There is no key `train.use_cpu`"),
]


@pytest.mark.parametrize(("override", "words"), VALUES, ids=lambda text: text[:40])
def test_a_value_that_cannot_be_used(dry, override, words):
    key, _, value = override.partition("=")
    assert words in dry(**{key.replace(".", "__"): value})


#: rows beside eight good ones, and words of the answer; None: they train
ROWS = {
    "no turns": (talk(), "row 8 has a column `messages` that is no list of turns, but []"),
    "null turns": ({"messages": None}, "row 8 has a column `messages` that is no list of turns, but None"),
    "text for turns": ({"messages": "hi"}, "row 8 has a column `messages` that is no list of turns, but 'hi'"),
    "one turn for turns": ({"messages": USER}, "row 8 has a column `messages` that is no list"),
    "another column": ({"text": "hi"}, "row 8 has a column `messages` that is no list"),
    "nested turns": (talk([USER, ASSISTANT]), "row 8 has a turn without a role (`messages`, turn 0)"),
    "a null turn": (talk(None), "row 8 has a turn without a role"),
    "a null role": (talk({"role": None, "content": "x"}), "row 8 has a turn without a role"),
    "null content": (talk(USER, ASSISTANT | {"content": None}), "row 8 has a turn without text (`messages`, turn 1)"),
    "content of a number": (talk(USER, ASSISTANT | {"content": 3}), "row 8 has a turn without text"),
    "an image": (talk(USER | {"content": [{"type": "image"}]}, ASSISTANT), "row 8 has a part of a content that is no"),
    "tools that are no JSON": (talk(USER, ASSISTANT, tools="[x"), "row 8 has `tools` that are not JSON"),
    "an unknown role": (talk(USER | {"role": "teller"}, ASSISTANT), "has a turn of 'teller'"),
    "no assistant": (talk(USER), "has no token of the assistant"),
    "an empty answer": (talk(USER, ASSISTANT | {"content": ""}), "has no token of the assistant"),
    "parts of a text": (talk(USER, ASSISTANT | {"content": [PART, PART]}), None),  # others say "0"
    "calls without content": (talk(USER, CALL, {"role": "tool", "content": "2"}, ASSISTANT), None),
    "calls with null content": (talk(USER, CALL | {"content": None}, ASSISTANT), None),
    "a role of the template": (talk(USER | {"role": "narrator"}, ASSISTANT), None),
    "arguments of the template": (talk(USER, ASSISTANT, chat_template_kwargs={"thinking": False}), None),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_looked_at(dry, tmp_path, name):
    row, words = ROWS[name]
    folder = model(tmp_path)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    said = dry(0 if words is None else 2, data__name=data(tmp_path, row), model__name=folder)
    assert words is None or words in said


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"text": "a"}, {"text": None}], "row 1 has a column `text` that is no text, but None"),
        ([{"text": 1}], "row 0 has a column `text`"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}], "row 1 has a column `completion`"),
        ([{"prompt": "a", "completion": [ASSISTANT]}], "turns in one of `prompt` and `completion`"),
        ([{"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}], "row 1 has a column `output`"),
        ([{"instruction": "a", "input": 3, "output": "b"}], "row 0 has a column `input`"),
        ([{"conversations": None}], "row 0 has a column `messages`"),
        ([{"conversations": [{"from": "human"}]}], "row 0 has a turn without text"),
        ([{"conversations": [{"from": "bot", "value": "x"}]}], "row 0 has a turn from 'bot'"),
        ([{"review": "good", "stars": 5}], "`review`, `stars`"),
        ([{"text": "a"}], "data.assistant_only_loss"),
        ([{"prompt": "word " * 50, "completion": "late"}] * 9, "no example has a token to learn within data.max_le"),
    ],
)
def test_every_shape_of_rows_is_looked_at(dry, tmp_path, lines, words):
    only = words == "data.assistant_only_loss"
    path = data(tmp_path, *lines, of=0)
    assert words in dry(data__name=path, data__max_length=32, data__assistant_only_loss=only)


def test_answers_that_are_all_cut_off_are_no_surprise_after_loading(dry, tmp_path):
    late = talk(USER | {"content": "word " * 50}, ASSISTANT)
    for packing in (True, False):
        assert "data.max_length=32" in dry(
            data__name=data(tmp_path, *[late] * 9, of=0), data__max_length=32, data__packing=packing
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pad_token_id": 999_999}, "pad_token_id is 999999, and the vocabulary has 4096"),
        ({"vocab_size": 0}, "model.name"),
        ({"model_type": "frobnicate"}, "`frobnicate`"),
        ({"model_type": "vit"}, "model.name"),
        ({"model_type": None}, "model.name"),
        ({"num_attention_heads": 0}, "model.name"),
        ({"hidden_size": "wide"}, "model.name"),
        ({"remove": ["config.json"]}, "the config.json in the folder"),
        ({"remove": ["model.safetensors"]}, "has no weights"),
        ({"remove": ["chat_template.jinja"]}, "has no chat_template"),
        ({"remove": ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]}, "it has no vocabulary"),
    ],
    ids=str,
)
def test_a_folder_that_holds_no_model(dry, tmp_path, changes, words):
    assert words in dry(model__name=model(tmp_path, **changes))


@pytest.mark.parametrize("text", ["[1]", "{}", "{", "null", '"text"'])
def test_a_config_json_that_holds_something_else(dry, tmp_path, text):
    folder = model(tmp_path)
    (folder / "config.json").write_text(text)
    assert f"the folder {folder}" in dry(model__name=folder)


def test_weights_that_are_cut_short_or_not_all_there(dry, tmp_path):
    folder = model(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors is damaged" in dry(model__name=folder)
    (folder / "model.safetensors").unlink()
    (folder / "model-1.safetensors").write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert "lacks model-2.safetensors" in dry(model__name=folder)
    index.write_text("[]")
    assert f"{index} cannot be read" in dry(model__name=folder)


def test_templates_are_asked(dry, tmp_path):
    folder = model(tmp_path)
    calls = data(tmp_path, talk(USER, CALL, ASSISTANT))
    assert "leaves out calls of tools (row 8 of" in dry(model__name=folder, data__name=calls)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('user and assistant must alternate') }}")
    said = dry(model__name=folder, data__assistant_only_loss=False)
    assert "refuses row 0 of" in said and "must alternate" in said
    assert "does not mark what the assistant says" in dry(model__name=folder)


@pytest.mark.parametrize("name", ["file", "file/run", "dangling", "final", "metrics.jsonl", "checkpoint-9"])
def test_a_folder_that_cannot_be_written(tmp_path, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    folder = tmp_path / name
    if name not in ("file", "file/run", "dangling"):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / name).write_text("x") if name == "final" else (folder / name).mkdir()
    for dry_run in (["--dry-run"], []):
        _, said = said_by([*tiny_run(folder), *dry_run], 2)
        assert "save.output_dir: " in said and (name != "checkpoint-9" or "resume_from_checkpoint=auto" in said)


def test_a_linked_folder_is_a_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    said_by([*tiny_run(tmp_path / "link"), "--dry-run"], 0)


@pytest.mark.parametrize(
    ("tracker", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboard>=2.18"), ("trackio", "trackio")]
)
def test_a_tracker_that_is_not_installed(dry, monkeypatch, tracker, package):
    from transformers.integrations import integration_utils

    def absent(*_):
        raise RuntimeError(f"it requires {tracker} to be installed.")

    monkeypatch.setattr(integration_utils.INTEGRATION_TO_CALLBACK[tracker], "__init__", absent)
    said = dry(log__report_to=tracker)
    assert f"log.report_to: {tracker} cannot be used here" in said and f"pip install {package}" in said.replace("'", "")


def test_nothing_is_loaded_before_all_was_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("expertmesh.train.run.load_model", lambda config: pytest.fail("a model was loaded"))
    for changes in (
        {"train__optim": "adam_of_eden"},
        {"data__name": data(tmp_path, talk())},
        {"lora": "{target_modules: [no_proj]}"},
        {"log__report_to": "wandbb"},
        {"save__resume_from_checkpoint": "nowhere"},
    ):
        said_by(tiny_run(tmp_path / "run", **changes), 2)


def test_what_the_hub_has_is_named_where_there_is_no_network(dry, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    said = dry(0, model__name="nobody/no-such-model", data__name="nobody/no-such-data")
    assert said.count("Not checked: ") == 3 and "nobody/no-such-data" in said
    assert "train.optim" in dry(model__name="nobody/no-such-model", train__optim="adam_of_eden")


def test_a_folder_with_a_script_is_no_data(dry, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.py").write_text("import datasets\n")
    assert "Dataset scripts are no longer supported" in dry(data__name=tmp_path / "rows")


def test_a_path_may_hold_an_equals_sign(tmp_path):
    path = tmp_path / "lr=1e-4" / "run=1.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump({"model": {"name": str(checkpoint())}, "data": {"name": str(data_file())}}))
    said, _ = said_by([str(path), "data.max_length=64", f"save.output_dir={tmp_path / 'a=b'}", "--dry-run"], 0)
    assert yaml.safe_load(said)["save"]["output_dir"] == str(tmp_path / "a=b")
    _, said = said_by([str(path.with_name("absent=1.yaml"))], 2)
    assert "Cannot read the configuration" in said


def test_a_folder_called_demo_is_not_taken_for_the_demo(dry, tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    dry(0, model__name="demo")


def test_rows_that_are_cut_to_nothing_are_counted(tmp_path):
    late = talk(USER | {"content": "word " * 50}, ASSISTANT)
    for packing in ("true", "false"):
        changes = {"data__max_length": 32, "data__packing": packing, "data__eval_fraction": 0, "train__max_steps": 1}
        name = data(tmp_path, *[late] * 3)
        _, said = said_by(tiny_run(tmp_path / packing, data__name=name, **changes), 0)
        assert "3 of 11 training rows have no token to learn within data.max_length=32" in said


def test_mixed_precision_needs_no_gpu(tmp_path):
    said_by(tiny_run(tmp_path, train__bf16="true", train__max_steps=1, data__eval_fraction=0), 0)
