"""The configuration: what it accepts, what it says about the rest."""

import pytest
import yaml

from expertmesh.train.config import DEMO, Config, ConfigError, known_keys, load_config

SIX_LINES = """\
model:
  name: Qwen/Qwen3-30B-A3B
data:
  name: my.jsonl
train:
  learning_rate: 1e-4
"""


def test_six_lines_are_a_configuration(tmp_path):
    (tmp_path / "run.yaml").write_text(SIX_LINES)
    config = load_config(tmp_path / "run.yaml")
    assert config.model.name == "Qwen/Qwen3-30B-A3B"
    assert config.train.learning_rate == 1e-4  # YAML reads 1e-4 as a string
    assert config.lora is None


def test_no_file_is_the_demo():
    config = load_config()
    assert config.model.name == "demo"
    assert config.train.max_steps == DEMO["train"]["max_steps"]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.learningrate", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("train.output_dir", "save.output_dir"),
        ("data.max_seq_length", "data.max_length"),
        ("lora.lora_alpha", "lora.alpha"),
        ("modle.name", "model.name"),
        ("train.lr", "train.learning_rate"),
        ("train.wd", "train.weight_decay"),
        ("train.batch_size", "train.per_device_train_batch_size"),
        ("train.eval_batch_size", "train.per_device_eval_batch_size"),
        ("train.epochs", "train.num_train_epochs"),
        ("train.grad_accum", "train.gradient_accumulation_steps"),
        ("train.gradient_checkpointing", "train.activation_checkpointing"),
        ("train.warmup_ratio", "train.warmup_steps"),
        ("train.optimizer", "train.optim"),
        ("train.resume", "save.resume_from_checkpoint"),
        ("lora.rank", "lora.r"),
        ("parallel.ep", "parallel.ep_size"),
        ("data.max_seq_len", "data.max_length"),
        ("dat.name", "data.name"),
        ("model.torch_dtype", "model.dtype"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(key, nearest):
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"{key}=1"])
    assert f"did you mean `{nearest}`?" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["train.optim=sgd", "train.optim_states=8bit"], "of AdamW, not of `train.optim` sgd"),
        (["train.optim=sgd", "train.optim_offload=true"], "of AdamW, not of `train.optim` sgd"),
        (["lora={}", "train.optim_states=24bit"], "LoRA's weights are float32"),
        (["model.dtype=float32", "train.optim_states=24bit"], "the weights are float32"),
        (["quantization.experts=nf4"], "freezes the experts in 4 bits: add `lora`"),
        (["quantization.experts=nf4", "lora={}", "model.fused={experts: false}"], "needs fused experts: change"),
    ],
)
def test_settings_that_exclude_each_other_are_an_error(keys, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, keys)


def test_a_key_like_no_other_points_to_the_schema():
    with pytest.raises(ConfigError, match="`expertmesh schema` lists all keys"):
        load_config(None, ["zzz=1"])


def test_overrides_are_read_as_yaml():
    config = load_config(None, ["lora.r=4", "model.fused={experts: false}", "log.report_to=wandb", "save.save_steps=5"])
    assert config.lora is not None and config.lora.r == 4
    assert config.model.fused == {"experts": False}
    assert config.log.report_to == ["wandb"]
    assert config.save.save_steps == 5


def test_an_override_wins_over_the_file_and_leaves_the_demo_as_it_is(tmp_path):
    (tmp_path / "run.yaml").write_text(SIX_LINES)
    assert load_config(tmp_path / "run.yaml", ["train.learning_rate=3e-5"]).train.learning_rate == 3e-5
    load_config(None, ["train.learning_rate=1"])
    assert load_config().train.learning_rate == DEMO["train"]["learning_rate"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.learning_rate=fast"], "`train.learning_rate` cannot be 'fast'"),
        (["train.max_steps=0"], "`train.max_steps` cannot be 0"),
        (["train.max_steps=5", "train.num_train_epochs=2"], "both set: remove one"),
        (["data.eval_split=test", "data.eval_fraction=0.1"], "both set: remove one"),
        (["train.max_steps"], "neither a file nor an override"),
        (["model.name.x=1"], "holds no keys"),
        (["train.activation_checkpointing=offload", "train.cuda_graph=true"], "leave `train.cuda_graph` at `auto`"),
        (["train.activation_checkpointing={experts: 0}"], "cannot be {'experts': 0}: it must be true, false, light"),
        (["train={max_steps: [}"], "not valid YAML"),
        (["model.fused={experts: perhaps}"], "`model.fused` cannot be"),
    ],
)
def test_a_wrong_value_is_one_paragraph_that_names_the_key(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["data: {name: x}", "model:\ndata: {name: x}"])
def test_a_missing_model_is_named_with_its_sentence(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match="`model.name` is missing. Model to fine-tune: a Hugging Face id"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n  seed: 1\n  max_steps: 2\n  seed: 3\n", "`seed` is in line 4 and again in line 6"),
        ("model: {name: demo}\n", "`model` is in line 1 and again in line 3"),
        ("1: x\n", "holds no sections"),
        ("2024-01-01: x\n", "There is no key `2024-01-01`"),
        ("train: {1: x}\n", "`train.1` cannot be 1"),
        ("train: {? [a] : x}\n", "is not valid YAML"),
        ("train: [seed]\n", "`train` cannot be ['seed']"),
        ("train: !!python/object:os.system {}\n", "is not valid YAML"),
        ("train: " + "[" * 5000, "is not valid YAML"),
    ],
)
def test_yaml_that_says_something_twice_or_something_else(tmp_path, text, said):
    (tmp_path / "run.yaml").write_text(f"model: {{name: demo}}\ndata: {{name: 'demo:all'}}\n{text}")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "run.yaml")
    assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_dates_are_text_and_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(None, ["model.name=2024-01-01", "data.name=2024-01-01 10:00:00", "save.output_dir=~/run"])
    assert config.model.name == "2024-01-01" and config.data.name == "2024-01-01 10:00:00"
    assert config.save.output_dir == "/home/somebody/run"


def test_python_s_word_for_the_newest_checkpoint_is_taken():
    newest = [load_config(None, [f"save.resume_from_checkpoint={word}"]).save for word in ("auto", "true", "false")]
    assert [save.resume_from_checkpoint for save in newest] == ["auto", "auto", None]


@pytest.mark.parametrize("text", ["model: [", "just words", ""])
def test_a_file_that_is_no_configuration_is_an_error(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(tmp_path / "run.yaml")


def test_an_unreadable_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory. Give the path"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize("key", ["save.output_dir", "save.resume_from_checkpoint", "model.name", "data.name"])
def test_the_home_folder_may_be_written_as_a_tilde(key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    section, _, name = key.partition(".")
    assert getattr(getattr(load_config(None, [f"{key}=~/run"]), section), name) == "/home/somebody/run"
    assert load_config(None, ["data.name=[~/a, b]"]).data.name == ["/home/somebody/a", "b"]


def test_the_resolved_configuration_loads_as_itself(tmp_path):
    for overrides in ([], ["lora={}"], ["data.eval_split=test"], ["model.fused={router: false}"]):
        config = load_config(None, overrides)
        (tmp_path / "run.yaml").write_text(config.to_yaml())
        assert load_config(tmp_path / "run.yaml") == config


def test_every_key_has_a_sentence():
    keys = dict(known_keys())
    assert len(keys) <= 55
    for key, sentence in keys.items():
        assert sentence.endswith(".") and len(sentence) > 10, key
    assert "train.learning_rate" in keys and "lora.r" in keys


def test_the_schema_holds_the_sentences():
    schema = yaml.safe_dump(Config.model_json_schema())
    assert "Peak learning rate." in schema
    assert "additionalProperties: false" in schema
