"""The bench at tiny size: every arm and work runs, on the same weights and tokens, and the result has its shape."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from expertmesh import backends
from expertmesh.bench import run as bench
from expertmesh.bench import steps
from expertmesh.bench.arms import ARMS, Arm, model_of, why_not
from expertmesh.bench.flops import step_flops
from expertmesh.bench.profile import NODE, RANGE, RULES, _traced
from expertmesh.bench.run import BenchOptions, run
from expertmesh.bench.works import WORKS, config_of

KEYS = """
work arm layers batch seq documents routing forward_ms backward_ms clip_ms optimizer_ms step_ms
tokens_per_second_per_gpu tflops_per_gpu percent_of_gemm peak_gib host_syncs launches
""".split()


def tiny(**changes):
    """A short run; returns (result, lines said)."""
    said = []
    options = {"works": ("qwen3-30b-a3b",), "arms": ("stock", "expertmesh"), "batches": (1,), "seq": 32} | changes
    result = run(BenchOptions(tiny=True, device="cpu", warmup=1, repeats=1, **options), say=said.append)
    return result, said


@pytest.mark.parametrize("work", WORKS)
def test_both_sides_of_every_work_compute_the_same(work):
    result, _ = tiny(works=(work,), batches=(1, 2), routings=("random-init", "skewed", "balanced"), full=True)
    assert not result["failed"]
    for row in result["rows"]:
        assert set(KEYS) <= set(row) and row["peak_gib"] is row["host_syncs"] is row["launches"] is None
        assert row["step_ms"] >= row["forward_ms"] > 0 and row["optimizer_ms"] > 0 and row["tokens_per_second_per_gpu"]
        assert (row["busiest"] == 1) == (row["routing"] == "balanced")
    losses = {}
    for row in result["rows"]:
        losses.setdefault((row["routing"], row["batch"]), []).append(row["loss"])
    assert len(losses) == 6
    for stock, ours in losses.values():
        assert ours == pytest.approx(stock, rel=1e-5)
    proof = result["parity"][work]["expertmesh"]
    assert proof["loss_error"] < 1e-5 and max(proof["gradient_errors"].values()) < 1e-5


@pytest.mark.parametrize("work", ["qwen3-30b-a3b", "deepseek-v3"])
def test_packed_documents_are_the_same_to_both_sides_and_need_fewer_operations(work):
    packed, _ = tiny(works=(work,), seq=128, batches=(1, 2), packed=True, proof=False)
    whole, _ = tiny(works=(work,), seq=128, batches=(1, 2), proof=False)
    assert not packed["failed"] and [row["documents"] for row in packed["rows"]] == [14] * 4
    losses = [[row["loss"] for row in result["rows"]] for result in (packed, whole)]
    assert losses[0][2:] == pytest.approx(losses[0][:2], rel=1e-5)
    assert all(abs(a - b) > 1e-4 for a, b in zip(*losses, strict=True)), "documents see each other"
    documents = steps.documents(128, True)
    assert sum(documents) == 128 and len(documents) == 14
    config = config_of(WORKS[work], None, True)
    assert sum(step_flops(config, 1, n) for n in documents) < step_flops(config, 1, 128)


def test_compiled_stock_is_compiled_for_every_batch(monkeypatch):
    compiled = []
    own = torch.nn.Module.compile
    monkeypatch.setattr(  # the compiler of the CPU takes half a minute
        torch.nn.Module, "compile", lambda self: (compiled.append(type(self).__name__), own(self, backend="eager"))
    )
    result, _ = tiny(arms=("stock-compiled", "stock"), layers=1, batches=(1, 2), proof=False)
    assert compiled == ["Qwen3MoeDecoderLayer"] * 2 and not result["failed"]
    for one, two in (result["rows"][:2], result["rows"][2:]):
        assert one["batch"] == 1 and two["batch"] == 2
    assert result["rows"][0]["loss"] == pytest.approx(result["rows"][2]["loss"], rel=1e-5)


def test_ablation_runs_ours_without_each_fusion_that_is_on():
    result, _ = tiny(works=("gpt-oss-20b",), arms=("expertmesh",), ablate=True, proof=False)
    fusions = ["experts", "rms_norm", "router", "sink_attention", "add_norm", "linear_cross_entropy"]
    assert [row["arm"] for row in result["rows"]] == ["expertmesh", *(f"expertmesh-no-{name}" for name in fusions)]
    with model_of(
        ARMS["expertmesh-no-router"], config_of(WORKS["gpt-oss-20b"], tiny=True), torch.float32, "cpu"
    ) as ours:
        assert [row.name for row in ours.fusion_report() if row.reason == "switched off"] == ["router"]


def test_ablation_runs_ours_without_each_library_that_is_installed(monkeypatch):
    monkeypatch.setattr(backends, "version_of", {"quack-kernels": "0.6.5"}.get)
    result, _ = tiny(works=("qwen3-30b-a3b",), arms=("expertmesh",), ablate=True, proof=False)
    assert [row["arm"] for row in result["rows"]][-1] == "expertmesh-no-quack-kernels"
    config = config_of(WORKS["qwen3-30b-a3b"], tiny=True)
    assert "not installed" in why_not(ARMS["expertmesh-no-flash-attn-4"], config, "cuda")
    monkeypatch.setattr(backends, "has_quack", lambda device: True)
    with model_of(ARMS["expertmesh-no-quack-kernels"], config, torch.float32, "cpu"):
        assert not backends.has_quack(torch.device("cuda"))
    assert backends.has_quack(torch.device("cuda"))


@pytest.mark.parametrize("work", ["qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3"])
def test_liger_patches_are_undone_and_start_from_the_same_weights(work):
    pytest.importorskip("liger_kernel")
    config = config_of(WORKS[work], tiny=True)
    modeling = importlib.import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")

    def state():
        classes = {name: dict(vars(value)) for name, value in vars(modeling).items() if isinstance(value, type)}
        return dict(vars(modeling)), {name: found.get("forward") for name, found in classes.items()}

    with model_of(ARMS["stock"], config, torch.float32, "cpu") as stock:
        weights = dict(stock.named_parameters())
    before = state()
    with model_of(ARMS["stock-liger"], config_of(WORKS[work], tiny=True), torch.float32, "cpu") as model:
        assert state() != before
        assert any("Liger" in type(module).__name__ for module in model.modules())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, weights[name])
    assert state() == before


def test_an_arm_that_fails_is_noted_and_the_others_run(tmp_path, monkeypatch):
    def broken(arm, *arguments):
        if arm.name == "stock":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return model_of(arm, *arguments)

    monkeypatch.setattr(bench, "model_of", broken)
    result, said = tiny(out=str(tmp_path / "new" / "r.json"), proof=False)
    assert [row["arm"] for row in result["rows"]] == ["expertmesh"]
    assert [(failure["arm"], failure["error"]) for failure in result["failed"]] == [
        ("stock", "OutOfMemoryError: CUDA out of memory.")
    ]
    assert json.loads((tmp_path / "new" / "r.json").read_text()) == result and any("FAILED" in line for line in said)


def test_an_arm_with_other_weights_is_not_timed():
    result, _ = tiny(arms=("stock",), proof=False)
    instance = bench._Bench(BenchOptions(tiny=True, seq=32), "cpu", "qwen3-30b-a3b", result, lambda line: None)
    for arm, scale in (("stock", 1.0), ("expertmesh", 1.0), ("expertmesh", 1.0001)):
        with model_of(ARMS[arm], config_of(WORKS["qwen3-30b-a3b"], tiny=True), torch.float32, "cpu") as model:
            with torch.no_grad():
                model.lm_head.weight.mul_(scale)
            if scale == 1.0:
                instance._same_weights(ARMS[arm], model, "random-init")
            else:
                with pytest.raises(AssertionError, match="lm_head.weight"):
                    instance._same_weights(ARMS[arm], model, "random-init")


def test_works_have_the_published_sizes():
    sizes = {"qwen3-30b-a3b": (48, 30.5), "nemotron-3-nano": (52, 31.6), "gpt-oss-20b": (24, 20.9)}
    for name, (layers, billions) in sizes.items():
        with model_of(ARMS["stock"], config_of(WORKS[name], layers), torch.bfloat16, "meta") as model:
            assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=0.01)
    published = {"n_routed_experts": 256, "first_k_dense_replace": 3}
    with model_of(ARMS["stock"], config_of(WORKS["deepseek-v3"], 61, **published), torch.bfloat16, "meta") as model:
        assert model.num_parameters() / 1e9 == pytest.approx(671, rel=0.01)


def test_why_an_arm_cannot_run():
    qwen, nemotron = (config_of(WORKS[name], tiny=True) for name in ("qwen3-30b-a3b", "nemotron-3-nano"))
    assert why_not(ARMS["stock"], qwen, "cpu") is None
    assert "GPU" in why_not(ARMS["stock-liger"], qwen, "cpu")
    assert "nemotron_h" in why_not(ARMS["stock-liger"], nemotron, "cuda")
    assert "off for nemotron_h anyway" in why_not(ARMS["expertmesh-no-qk_norm_rope"], nemotron, "cpu")
    assert why_not(Arm("x", ours=True, without="router"), nemotron, "cpu") is None


@pytest.mark.parametrize("work", WORKS)
def test_a_profile_finds_every_component_of_the_model(work):
    result, _ = tiny(works=(work,), arms=("stock", "expertmesh"), profile=True, proof=False, batches=(2,))
    expected = {"attention core", "attention linears", "norms, RoPE", "router", "loss head", "embedding"}
    expected |= {"Mamba2 linears", "Mamba2 scan"} if work == "nemotron-3-nano" else set()
    expected |= {"other MLPs"} if work != "gpt-oss-20b" else set()
    for arm, profile in result["profiles"][f"{work}, random-init"].items():
        found = {row["component"]: row for row in profile["components"]}
        stock_only = {"experts up", "experts dgrads", "experts wgrads"} if arm == "stock" else set()
        if stock_only and work != "nemotron-3-nano":  # whose tiny experts are as wide as what they take in
            stock_only.add("experts down")
        assert expected | stock_only <= set(found)
        for name in expected | stock_only:
            assert found[name]["launches"] > 0 and found[name]["floor"], name
        whole = sum(row["launches"] for row in found.values())
        assert found["residual adds and the rest"]["launches"] < 0.2 * whole


@pytest.mark.parametrize(
    ("module", "what", "component"),
    [
        ("M/L/Qwen3MoeAttention", "forward aten::_cudnn cudnn_generated_fort_native_sdpa_sm90", "attention core"),
        ("M/L/Qwen3MoeAttention/Linear", "backward aten::mm nvjet_sm90_tst_256x128", "attention linears"),
        ("M/L/Qwen3MoeAttention", "backward _QKNormRopeBackward _backward", "norms, RoPE"),
        ("M/L/Block/Qwen3MoeExperts", "forward _Up _place_kernel", "grouping"),
        ("M/L/Block/Qwen3MoeExperts", "forward _Up _up_act_kernel", "experts up"),
        ("M/L/Block/Qwen3MoeExperts", "forward _Down _grouped_gemm_kernel", "experts down"),
        ("M/L/Block/Qwen3MoeExperts", "backward _UpBackward _grouped_gemm_kernel", "experts dgrads"),
        ("M/L/Block/Qwen3MoeExperts", "backward _DownBackward _down_dact_kernel", "experts dgrads"),
        ("M/L/Block/Qwen3MoeExperts", "backward _UpBackward _grouped_wgrad_kernel", "experts wgrads"),
        ("M/L/Block/Qwen3MoeExperts", "forward _Down kernel_cutlass_kernel_quackgemm_sm90", "experts down"),
        ("M/L/Block/Qwen3MoeExperts", "forward _Up first kernel_cutlass_kernel_quackepilogue", "experts up"),
        ("M/L/Block/Qwen3MoeExperts", "backward _UpBackward first kernel_cutlass_kernel_quackgemm", "experts dgrads"),
        ("M/L/Block/Qwen3MoeExperts", "backward _UpBackward kernel_cutlass_kernel_quackgemm_sm90", "experts wgrads"),
        ("M/L/Block/Qwen3MoeExperts", "backward _DownBackward kernel_cutlass_kernel_quackgemm", "experts wgrads"),
        ("M/L/Block/Qwen3MoeExperts", "backward _UpBackward _combine_kernel", "combine"),
        ("M/L/Block/Qwen3MoeExperts", "backward _DownBackward _unsort_kernel", "combine"),
        ("Qwen3MoeForCausalLM", "forward _LinearCrossEntropy _rows_kernel", "loss head"),
        ("M/Qwen3MoeDecoderLayer", "forward _RMSNorm _norm_forward", "norms, RoPE"),
        ("M/Qwen3MoeDecoderLayer", "backward aten::add vectorized_elementwise_kernel", "residual adds and the rest"),
    ],
)
def test_our_kernels_have_their_component(module, what, component):
    assert next(name for name, where, which in RULES if where.search(module) and which.search(what)) == component


def test_kernels_are_traced_to_modules_and_none_is_lost_or_counted_twice():
    def event(name, parent=None, kernels=(), sequence=-1, device=DeviceType.CPU, shadow=False):
        launched = [SimpleNamespace(name=kernel, duration=10.0) for kernel in kernels]
        return SimpleNamespace(
            name=name, cpu_parent=parent, kernels=launched, sequence_nr=sequence, device_type=device,
            is_user_annotation=shadow, input_shapes=[], time_range=SimpleNamespace(elapsed_us=lambda: 10.0),
        )  # fmt: skip

    head = event(f"{RANGE}Head")
    linear = event(f"{RANGE}Linear", head, [f"{RANGE}Linear"])  # the profiler links a range to its shadow on the GPU
    forward = event("aten::mm", linear, ["gemm"], sequence=7)
    node = event(f"{NODE}MmBackward0", sequence=7)
    backward = event("aten::mm", node, ["gemm", "gemm"], sequence=7)
    names = ["gemm", "gemm", "gemm", "stray"]
    device = [event(name, device=DeviceType.CUDA) for name in names]
    device.append(event(f"{RANGE}Linear", device=DeviceType.CUDA, shadow=True))
    found = list(_traced([head, linear, forward, node, backward, *device], True, (1, 1)))
    assert found == [
        ("Head/Linear", "forward aten::mm first gemm", 10.0),
        ("Head/Linear", "backward aten::mm first gemm", 10.0),
        ("Head/Linear", "backward aten::mm gemm", 10.0),
        ("", "stray", 10.0),
    ]
