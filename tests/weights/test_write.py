"""A sharded model is written as `save_pretrained` writes the whole one, by ranks that never hold it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig

import expertmesh
from expertmesh.bench.tiny import FAMILIES
from expertmesh.parallel import ranks
from expertmesh.weights.read import load_weights
from expertmesh.weights.write import INDEX, WEIGHTS, _own_tensors, _split, save_sharded, write_model
from tests.distributed.ranks import on_the_same_ranks
from tests.models import load_ours, saved

LAYOUTS = [
    {"fsdp_size": 4, "ep_size": 4},
    {"fsdp_size": 4, "ep_size": 2},
    {"fsdp_size": 4},
    {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
    {"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2},
]


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as weights:
        return weights.metadata()


def assert_same_checkpoint(written: Path, original: Path):
    """Keys, shapes, dtypes, bits and configuration; where there are several files, the index finds every tensor."""
    wanted, found = load_file(original / "model.safetensors"), {}
    index = written / INDEX
    weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    for file in written.glob("*.safetensors"):
        tensors = load_file(file)
        assert metadata(file) == metadata(original / "model.safetensors")
        assert not found.keys() & tensors.keys()
        assert not weight_map or all(weight_map[key] == file.name for key in tensors)
        found |= tensors
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key
    for name in ("config.json", "generation_config.json"):
        assert (written / name).exists() == (original / name).exists()
    assert json.loads((written / "config.json").read_text()) == json.loads((original / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_writes_what_transformers_writes(family, tmp_path):
    save_sharded(load_ours(family), tmp_path / "written")
    load_ours(family).save_pretrained(tmp_path / "stock")
    assert_same_checkpoint(tmp_path / "written", tmp_path / "stock")


def write_and_read(rank: int, source: Path, folder: Path, layouts: list[dict]) -> list[str]:
    """Saves under each layout, wipes the model, and reads it back in place; returns what did not come back."""
    wrong = []
    for number, layout in enumerate(layouts):
        config = DistributedConfig(**layout)
        model = expertmesh.AutoModelForCausalLM.from_pretrained(source, distributed_config=config, dtype=torch.float32)
        before = {name: value.to_local().clone() for name, value in model.named_parameters()}
        model.save_pretrained(folder / str(number), max_shard_size="20KB")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().zero_()
        load_weights(model, folder / str(number))
        after = dict(model.named_parameters())
        wrong += [
            f"{layout} {name}" for name, value in before.items() if not torch.equal(after[name].to_local(), value)
        ]
    return wrong


def test_four_ranks_write_what_one_process_writes(tmp_path):
    families = ["qwen3_moe", "gpt_oss", "nemotron_h"]
    several = [(saved(family), tmp_path / family, LAYOUTS) for family in families]
    assert on_the_same_ranks(4, write_and_read, several) == [[[]] * 4] * len(families)
    for family in families:
        for number in range(len(LAYOUTS)):
            written = tmp_path / family / str(number)
            assert len(list(written.glob("*.safetensors"))) > 4
            assert_same_checkpoint(written, saved(family))


def test_files_of_an_earlier_save_go(tmp_path):
    model = load_ours("qwen3_moe")
    save_sharded(model, tmp_path, max_shard_size="10kb")
    save_sharded(model, tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    assert_same_checkpoint(tmp_path, saved("qwen3_moe"))


def test_the_index_says_of_the_whole_what_transformers_says(tmp_path):
    model, found = load_ours("qwen3_moe"), []
    for save in (save_sharded, type(model).save_pretrained):
        save(model, tmp_path / save.__name__, max_shard_size="20KB")
        found.append(json.loads((tmp_path / save.__name__ / INDEX).read_text())["metadata"])
    assert found[0] == found[1]


def test_what_ranks_do_not_share_they_write_in_turn(monkeypatch):
    """Each tensor once, and of its bytes no rank has more than the others by more than one weight."""
    model, shares = load_ours("qwen3_moe"), []
    monkeypatch.setattr(ranks, "world_size", lambda group=None: 4)
    for rank in range(4):
        monkeypatch.setattr(ranks, "rank", lambda group=None, rank=rank: rank)
        shares.append({key: value.nbytes for key, value in _own_tensors(model)})
    assert sorted(key for share in shares for key in share) == sorted(load_file(saved("qwen3_moe") / WEIGHTS))
    sizes = [sum(share.values()) for share in shares]
    assert max(sizes) - min(sizes) <= max(value.nbytes for value in model.parameters())


def test_a_file_has_the_bytes_that_are_allowed_or_one_tensor():
    sizes = {"a": 20, "b": 8, "c": 8, "d": 1}
    files = _split([(name, torch.zeros(size, dtype=torch.uint8)) for name, size in sizes.items()], 16)
    assert [[*file] for file in files] == [["a"], ["b", "c"], ["d"]]


def test_a_rank_that_cannot_write_goes_on_gathering_with_the_others(tmp_path):
    files = iter([{"a": torch.zeros(1)}] * 3)
    with pytest.raises(Exception, match="No such file"):
        write_model(tmp_path / "nowhere", load_ours("qwen3_moe"), files)
    assert next(files, None) is None


@pytest.mark.parametrize("size", ["5 bananas", "GB"])
def test_a_size_that_is_none_is_refused(size, tmp_path):
    with pytest.raises(ValueError, match="not in a valid format"):
        save_sharded(load_ours("qwen3_moe"), tmp_path, max_shard_size=size)
