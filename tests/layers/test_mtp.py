"""Multi-token prediction: the losses of DeepSeek-V3's paper, weights that come and go under their names, and a model
that is otherwise the one without it.
"""

import copy
import functools
import json
import pickle
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from expertmesh import AutoModelForCausalLM
from expertmesh.bench.export import differing_tensors
from expertmesh.bench.parity import check_checkpoint
from expertmesh.bench.rows import relative_error
from expertmesh.bench.tiny import randomise, tiny_config
from expertmesh.checkpoint.state import load_checkpoint, save_checkpoint
from expertmesh.kernels import linear_cross_entropy
from expertmesh.layers.mtp import drop_missing_modules
from expertmesh.moe.experts import is_experts
from expertmesh.weights.read import load_weights
from tests.models import saved as saved_without

FAMILIES = ("deepseek_v3", "glm4_moe", "nemotron_h")
DEPTHS, WEIGHT, TOLERANCE = 2, 0.3, 1e-5
_FOLDERS = tempfile.TemporaryDirectory(prefix="tiny-mtp-")


@functools.cache
def saved(family: str, depths: int = DEPTHS) -> Path:
    """A tiny checkpoint with MTP weights. Do not write into it."""
    folder = Path(_FOLDERS.name, f"{family}-{depths}")
    config = tiny_config(family, num_nextn_predict_layers=depths)
    torch.manual_seed(0)  # of what `randomise` only moves
    randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32, mtp_loss_weight=1)).save_pretrained(folder)
    return folder


def load(family: str, weight: float | None = WEIGHT, **options):
    return AutoModelForCausalLM.from_pretrained(
        saved(family), dtype=torch.float32, **{"mtp_loss_weight": weight} | options
    )


def stock(family: str):
    return transformers.AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.float32)


def on_disk(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def of_mtp(key: str) -> bool:
    return key.startswith(("mtp.", "model.layers.3.", "model.layers.4."))  # on disk; Nemotron's main layers: backbone.


def batch(rows: int = 2, length: int = 19) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, :5] = -100  # a prompt
    labels[-1, 9:10] = -100
    return {"input_ids": ids, "labels": labels}


class Written(nn.Module):
    """One MTP module of the paper, from stock Transformers' classes, as checkpoints name its parts."""

    def __init__(self, family: str, main):
        super().__init__()
        self.family, config = family, main.config
        if family != "nemotron_h":
            norm = functools.partial(type(main.model.norm), config.hidden_size, eps=config.rms_norm_eps)
            self.layers = nn.ModuleList([type(main.model.layers[-1])(config, 3)])
            self.layers[-1].shared_head = nn.Module()
            self.layers[-1].shared_head.norm = self.last = norm()
        else:
            norm = functools.partial(type(main.model.norm_f), config.hidden_size, eps=config.layer_norm_epsilon)
            self.layers = nn.ModuleList([type(main.model.layers[0])(config, index) for index in (2, 1)])
            self.layers[-1].final_layernorm = self.last = norm()
        first = self.layers[0]
        first.enorm, first.hnorm = norm(), norm()
        first.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, main, hidden: torch.Tensor, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        first = self.layers[0]
        x = first.eh_proj(torch.cat([first.enorm(embeds), first.hnorm(hidden)], -1))
        rope = {"position_embeddings": main.model.rotary_emb(x, positions)} if self.family != "nemotron_h" else {}
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_ids=positions, **rope)
        return self.last(x)


def straightforward(family: str, ids, labels, weight: float, num_items=None):
    """(loss, gradients by our names) with whole logits and sequences that get shorter with the depth; one document."""
    main = stock(family).train()
    modules = [Written(family, main) for _ in range(DEPTHS)]
    for number, module in enumerate(modules):
        name = f"model.layers.{3 + number}" if family != "nemotron_h" else None
        for index, layer in enumerate(module.layers):
            prefix = name or f"mtp.layers.{2 * number + index}"
            ours = {k.removeprefix(f"{prefix}."): v for k, v in load(family).state_dict().items() if f"{prefix}." in k}
            ours = {k: v for k, v in ours.items() if not k.startswith("model.") and "backbone" not in k}
            layer.load_state_dict(ours)

    def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return total / ((targets != -100).sum() if num_items is None else num_items)

    hidden = main.model(ids, use_cache=False).last_hidden_state
    loss = cross_entropy(main.lm_head(hidden[:, :-1]), labels[:, 1:])
    for depth, module in enumerate(modules, 1):
        embeds = main.get_input_embeddings()(ids[:, depth:])
        hidden = module(main, hidden[:, :-1], embeds, torch.arange(ids.shape[1] - depth)[None])
        loss = loss + weight / DEPTHS * cross_entropy(main.lm_head(hidden[:, :-1]), labels[:, depth + 1 :])
    loss.backward()
    grads = {name: p.grad for name, p in main.named_parameters()}
    for number, module in enumerate(modules):
        for index, layer in enumerate(module.layers):
            prefix = f"model.layers.{3 + number}" if family != "nemotron_h" else f"mtp.layers.{2 * number + index}"
            grads |= {f"{prefix}.{name}": p.grad for name, p in layer.named_parameters()}
    return loss.detach(), grads


def compare(ours, loss: torch.Tensor, grads: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    assert relative_error(out.detach(), loss) <= TOLERANCE
    got = {name: p.grad for name, p in ours.named_parameters()}
    assert got.keys() == grads.keys()
    for name, want in grads.items():
        assert want.abs().max() > 0 and relative_error(got[name], want) <= TOLERANCE, name


@pytest.mark.parametrize("num_items", [None, 50])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_all_gradients_are_those_of_the_paper(family, num_items):
    inputs = batch()
    ours = load(family).train()
    out = ours(**inputs, num_items_in_batch=num_items)
    out.loss.backward()
    compare(ours, *straightforward(family, inputs["input_ids"], inputs["labels"], WEIGHT, num_items), out.loss)


@pytest.mark.parametrize(
    "way", ["checkpointing", "reentrant", "embeds", "shift_labels", "tuple", "num_items tensor", "whole logits"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_ways_to_call_give_the_same(family, way):
    inputs = batch()
    want = straightforward(family, inputs["input_ids"], inputs["labels"], WEIGHT, 50)
    ours = load(family, fused={"linear_cross_entropy": False} if way == "whole logits" else True).train()
    inputs["num_items_in_batch"] = torch.tensor(50) if way == "num_items tensor" else 50
    if way in ("checkpointing", "reentrant"):
        ours.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
        ours.enable_input_require_grads()
    if way == "embeds":
        inputs["inputs_embeds"] = ours.get_input_embeddings()(inputs.pop("input_ids"))
    if way == "shift_labels":
        inputs["shift_labels"] = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    if way == "tuple":
        inputs["return_dict"] = False
    out = ours(**inputs)
    loss = out[0] if way == "tuple" else out.loss
    loss.backward()
    compare(ours, *want, loss)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same():
    ours, inputs = load("deepseek_v3").train(), batch()
    want = ours(**inputs).loss.detach()
    torch._dynamo.reset()
    assert relative_error(torch.compile(ours, backend="eager")(**inputs).loss.detach(), want) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_do_not_predict_each_other(family):
    """Packed, the loss is the sum over the documents alone: no label of a document is asked of the one before."""
    ids = batch(1, 24)["input_ids"]
    lengths = (9, 3, 12)
    alone, packed = load(family).train(), load(family).train()
    losses = []
    for document in ids.split(lengths, 1):
        losses.append(alone(input_ids=document, labels=document, num_items_in_batch=21).loss)
        losses[-1].backward()
    labels, positions = ids.clone(), torch.cat([torch.arange(n) for n in lengths])[None]
    labels[positions == 0] = -100
    inputs = {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}
    loss = packed(**inputs, num_items_in_batch=21).loss
    loss.backward()
    compare(packed, sum(losses).detach(), {n: p.grad for n, p in alone.named_parameters()}, loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family):
    ids = batch(1)["input_ids"]
    alone, padded = load(family).train(), load(family).train()
    want = alone(input_ids=ids, labels=ids, num_items_in_batch=18).loss
    want.backward()
    mask = F.pad(torch.ones_like(ids), (0, 5))
    loss = padded(
        input_ids=F.pad(ids, (0, 5)), attention_mask=mask, labels=F.pad(ids, (0, 5), value=-100), num_items_in_batch=18
    ).loss
    loss.backward()
    compare(padded, want.detach(), {n: p.grad for n, p in alone.named_parameters()}, loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_labels_that_far_ahead_has_the_main_loss(family):
    ids = batch(1, 2)["input_ids"]
    with_mtp, without = load(family).train(), load(family, None).train()
    loss = with_mtp(input_ids=ids, labels=ids).loss
    assert relative_error(loss.detach(), without(input_ids=ids, labels=ids).loss.detach()) <= TOLERANCE
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in with_mtp.parameters())


def test_no_logits_are_held(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "chunk_rows", lambda *args: 4)
    ours, inputs = load("deepseek_v3").train(), batch()
    sizes = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ours(**inputs).loss.backward()
    tokens, vocab = inputs["labels"].numel(), ours.config.vocab_size
    assert sizes and not [s for s in sizes if s[-1:] == (vocab,) and torch.Size(s).numel() >= tokens * vocab]


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_and_generation_are_stock(family, weight):
    ours, main, inputs = load(family, weight).eval(), stock(family).eval(), batch()
    with torch.no_grad():
        got, want = ours(**inputs, output_hidden_states=True), main(**inputs, output_hidden_states=True)
    assert relative_error(got.loss, want.loss) <= TOLERANCE and relative_error(got.logits, want.logits) <= TOLERANCE
    assert len(got.hidden_states) == len(want.hidden_states)
    prompt = inputs["input_ids"][:1, :7]
    made = [model.generate(prompt, max_new_tokens=6, do_sample=False) for model in (ours, main)]
    assert torch.equal(*made)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_transformers_drafts_with_what_was_saved(weight):
    """`use_mtp` builds modules of its own, from the classes of our layers and the weights in our files."""
    made = []
    for model in (stock("deepseek_v3"), load("deepseek_v3", weight)):
        model._keys_to_ignore_on_load_unexpected |= {r"model\.layers\.[34].*"}  # its list names layer 61 alone
        options = {"max_new_tokens": 8, "do_sample": False, "use_mtp": True}
        made.append(model.eval().generate(batch(1, 7)["input_ids"], **options))
    assert torch.equal(*made)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_modules_take_no_part_in_training_and_are_saved_byte_equal(family, tmp_path):
    ours, main, inputs = load(family, None).train(), stock(family).train(), batch()
    loss = ours(**inputs).loss
    assert relative_error(loss.detach(), main(**inputs).loss.detach()) <= TOLERANCE
    loss.backward()
    frozen = {name for name, p in ours.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in ours.named_parameters() if p.grad is None}
    assert frozen == {name for name, _ in ours.named_parameters()} - {name for name, _ in main.named_parameters()}
    torch.optim.AdamW(ours.parameters(), lr=0.1).step()
    ours.save_pretrained(tmp_path)
    got, want = on_disk(tmp_path), on_disk(saved(family))
    assert got.keys() == want.keys()
    shared = (".embed_tokens.weight", ".shared_head.head.weight")  # one parameter here, trained with the main model
    for key in filter(of_mtp, want):
        assert torch.equal(got[key], want[key]) != key.endswith(shared), key
    for key in got:
        if key.endswith(shared) and of_mtp(key):
            main_key = "model.embed_tokens.weight" if "embed" in key else "lm_head.weight"
            assert torch.equal(got[key], got[main_key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("family", FAMILIES)
def test_loading_and_saving_changes_no_byte(family, weight, dtype, tmp_path):
    if dtype == torch.bfloat16:
        AutoModelForCausalLM.from_pretrained(saved(family), dtype=dtype).save_pretrained(tmp_path / "original")
    original = saved(family) if dtype == torch.float32 else tmp_path / "original"
    ours = AutoModelForCausalLM.from_pretrained(original, dtype="auto", mtp_loss_weight=weight)
    ours.save_pretrained(tmp_path / "again")
    got, want = on_disk(tmp_path / "again"), on_disk(original)
    assert any(of_mtp(key) for key in want) and not differing_tensors(got, want)
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads(
        (original / "config.json").read_text()
    )
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert not differing_tensors(
        reloaded.state_dict(), {k: v for k, v in ours.state_dict().items() if not ours._mtp.owns(k)}
    )


def test_saving_a_given_state_dict_repeats_what_is_shared(tmp_path):
    ours = load("deepseek_v3")
    ours.save_pretrained(tmp_path, state_dict={key: value.bfloat16() for key, value in ours.state_dict().items()})
    got = on_disk(tmp_path)
    assert got.keys() == on_disk(saved("deepseek_v3")).keys()
    assert {value.dtype for value in got.values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_modules_are_saved_and_come_back(family, tmp_path):
    ours = load(family).train()
    ours(**batch()).loss.backward()
    torch.optim.AdamW(ours.parameters(), lr=0.1).step()
    ours.save_pretrained(tmp_path)
    before, after = on_disk(saved(family)), on_disk(tmp_path)
    assert before.keys() == after.keys()
    assert not [k for k in filter(of_mtp, before) if "correction" not in k and torch.equal(before[k], after[k])]
    loss = ours(**batch()).loss.detach()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, mtp_loss_weight=WEIGHT).train()
    into, from_names = load(family).train(), load(family).train()
    load_weights(into, tmp_path)
    assert not from_names.load_state_dict(on_disk(tmp_path)).unexpected_keys
    for model in (again, into, from_names):
        assert torch.equal(model(**batch()).loss.detach(), loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_without_them_has_none(family):
    ours = AutoModelForCausalLM.from_pretrained(saved_without(family), dtype=torch.float32, num_nextn_predict_layers=1)
    main = transformers.AutoModelForCausalLM.from_pretrained(saved_without(family), dtype=torch.float32)
    assert ours.state_dict().keys() == main.state_dict().keys()
    assert all(p.requires_grad for p in ours.parameters())
    rows = {row.name: row for row in ours.fusion_report()}
    assert rows["experts"].count == sum(map(is_experts, main.modules()))
    assert rows["rms_norm"].count == len(
        [m for m in main.modules() if re.search(r"(V3|Moe|H)RMSNorm$", type(m).__name__)]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_they_can_be_left_out(family):
    ours = load(family, None, num_nextn_predict_layers=0)
    assert ours._mtp is None and ours.state_dict().keys() == stock(family).state_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_from_config_makes_them_only_when_they_are_trained(family):
    config = tiny_config(family, num_nextn_predict_layers=1)
    for options in ({}, {"mtp_loss_weight": 0.1}):
        torch.manual_seed(0)
        ours = AutoModelForCausalLM.from_config(config, **options)
        torch.manual_seed(0)
        main = transformers.AutoModelForCausalLM.from_config(config)
        got = ours.state_dict()
        assert not differing_tensors({key: got[key] for key in main.state_dict()}, main.state_dict())
        assert (len(got) > len(main.state_dict())) == bool(options)
    std = {key: value.float().std() for key, value in got.items() if ours._mtp.owns(key) and value.ndim > 1}
    assert all(0.01 < value < 0.03 for value in std.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_the_model_train_alike(family):
    ours = load(family).train()
    loss = ours(**batch()).loss.detach()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(**batch()).loss.detach(), loss)
        assert not any(hook for module in other.modules() for hook in module._forward_pre_hooks)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_learn_from_it(family):
    torch.manual_seed(0)
    ours = get_peft_model(load(family), LoraConfig(target_modules=["o_proj"], init_lora_weights=False)).train()
    want = load(family).train()(**batch()).loss
    out = ours(**batch())
    assert relative_error(out.loss.detach(), want.detach()) > 1e-5
    out.loss.backward()
    grads = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert all(grad.abs().max() > 0 for grad in grads.values())
    assert any("mtp." in name or "layers.3" in name for name in grads)


def test_under_autocast_it_is_close(family="deepseek_v3"):
    ours = load(family).train()
    want = ours(**batch()).loss.detach()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(**batch()).loss
    loss.backward()
    assert loss.dtype == torch.float32 and relative_error(loss.detach(), want) < 0.03


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_hold_them_and_the_check_command_passes_them_by(family, tmp_path):
    ours, other = load(family), load(family)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.01)
    save_checkpoint(tmp_path, model=ours, optimizer=torch.optim.SGD(ours.parameters()), step=1)
    load_checkpoint(tmp_path / "checkpoint-1", model=other, optimizer=torch.optim.SGD(other.parameters()))
    assert not differing_tensors(other.state_dict(), ours.state_dict())
    assert on_disk(tmp_path / "checkpoint-1").keys() == on_disk(saved(family)).keys()
    assert all(row.ok for row in check_checkpoint(saved(family)))


def test_a_quantized_model_does_without_modules_that_are_less_quantized(caplog):
    model = load("deepseek_v3")
    every = SimpleNamespace(missing_keys=set(), unexpected_keys=set())
    drop_missing_modules(model, every, "here")
    assert model._mtp is not None
    part = SimpleNamespace(missing_keys={"model.layers.3.eh_proj.weight", "model.norm.weight"}, unexpected_keys=set())
    with pytest.raises(ValueError, match="only a part"):
        drop_missing_modules(model, part, "here")
    drop_missing_modules(model, part, "here", quantized=True)
    assert "are left out" in caplog.text and part.missing_keys == {"model.norm.weight"}
    assert model._mtp is None and model.state_dict().keys() == stock("deepseek_v3").state_dict().keys()


def test_wrong_use_says_what_to_do(tmp_path):
    folder = saved("deepseek_v3")
    for weight in (0, -1.0, float("nan"), float("inf"), True, "0.3"):
        with pytest.raises(ValueError, match="give a positive number"):
            AutoModelForCausalLM.from_pretrained(folder, mtp_loss_weight=weight)
    with pytest.raises(ValueError, match="leave mtp_loss_weight out"):
        AutoModelForCausalLM.from_pretrained(folder, mtp_loss_weight=0.1, fused=False)
    for family in ("deepseek_v3", "qwen3_moe"):
        with pytest.raises(ValueError, match="no modules for multi-token prediction"):
            AutoModelForCausalLM.from_pretrained(saved_without(family), mtp_loss_weight=0.1)
    with pytest.raises(ValueError, match="no modules for multi-token prediction"):
        AutoModelForCausalLM.from_config(tiny_config("nemotron_h"), mtp_loss_weight=0.1)
    with pytest.raises(ValueError, match="no modules for multi-token prediction"):
        AutoModelForCausalLM.from_config(tiny_config("nemotron_h")).mtp_loss_weight = 0.1
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    weights = on_disk(folder)
    del weights["model.layers.3.eh_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"only a part .*: model\.layers\.3\.eh_proj\.weight is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0"):
        AutoModelForCausalLM.from_config(
            tiny_config("nemotron_h", layers_block_type=["moe", "mlp"], num_nextn_predict_layers=1), mtp_loss_weight=1.0
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_made_elsewhere_is_refused_where_it_would_leave_them_untrained(family):
    ours, inputs = load(family).train(), batch()
    labels = inputs.pop("labels")
    for call in (ours, ours.model, get_peft_model(load(family), LoraConfig(target_modules=["o_proj"])).train()):
        with pytest.raises(ValueError, match="mtp_loss_weight is set, but the model was called without labels"):
            call(**inputs)
    with torch.no_grad():
        ours(**inputs)
    ours.mtp_loss_weight = None
    ours(**inputs).logits.sum().backward()
    ours.mtp_loss_weight = WEIGHT
    ours.eval()(**inputs)
    assert ours.train()(**inputs, labels=labels).loss.isfinite()


@pytest.mark.parametrize(
    ("family", "promise"),
    [("deepseek_v3", "num_nextn_predict_layers"), ("glm4_moe", "num_nextn_predict_layers"),
     ("nemotron_h", "num_nextn_predict_layers"), ("qwen3_5_moe_text", "mtp_num_hidden_layers"),
     ("qwen3_next", "num_nextn_predict_layers")],
)  # fmt: skip
def test_the_configuration_promises_no_modules_that_are_not_there(family, promise, tmp_path):
    """Inference engines build as many as it says, and look for their weights."""
    model = AutoModelForCausalLM.from_pretrained(saved_without(family), dtype=torch.float32)
    setattr(model.config, promise, 1)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())[promise] == 0
