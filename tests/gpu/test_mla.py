"""Latent attention (MLA) on a GPU: the kernel as near to float32 as stock's operations, no T x T matrix, no waiting."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from expertmesh.kernels.mla_rope import mla_rope, mla_rope_reference
from tests.kernels.compare import outputs_and_grads
from tests.models import load_ours

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def inputs(batch: int, seq: int, heads: int, nope: int = 128, rope: int = 64, value: int = 128):
    """Leaves in bfloat16, and cos and sin, as DeepSeek V3 has them."""
    torch.manual_seed(0)
    shapes = (batch, seq, heads, nope + rope), (batch, seq, heads, nope + value), (batch, seq, rope)
    leaves = [torch.randn(*shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    angle = torch.rand(1, seq, rope // 2, device="cuda").mul(6).repeat(1, 1, 2)
    return leaves, (angle.cos().bfloat16(), angle.sin().bfloat16())


@pytest.mark.parametrize(
    ("batch", "seq", "heads", "nope", "value"), [(1, 512, 128, 128, 128), (3, 129, 20, 192, 256), (2, 65, 7, 16, 24)]
)
def test_kernel_is_as_exact_as_the_operations_it_replaces(batch, seq, heads, nope, value):
    leaves, turn = inputs(batch, seq, heads, nope, value=value)
    exact = outputs_and_grads(
        lambda *x: mla_rope_reference(*x, *(part.float() for part in turn)),
        *(x.detach().float().requires_grad_() for x in leaves),
    )
    ours, stock = (outputs_and_grads(lambda *x, fn=fn: fn(*x, *turn), *leaves) for fn in (mla_rope, mla_rope_reference))
    for name, mine, theirs, want in zip(("q", "k", "v", "dq", "dkv", "dk_rope"), ours, stock, exact, strict=True):
        error, allowed = (float((x.double() - want.double()).norm() / want.double().norm()) for x in (mine, theirs))
        assert error <= 1.1 * allowed + 1e-6, (name, error, allowed)


def test_attention_takes_what_the_kernel_makes_without_a_matrix_of_scores():
    """The memory of one head's scores would show; on Hopper and Blackwell it is cuDNN's kernel."""
    seq, heads = 4096, 16
    leaves, turn = inputs(1, seq, heads)
    query, key, value = mla_rope(*leaves, *turn)
    choice = SDPBackend(torch._fused_sdp_choice(query, key, value, is_causal=True))
    assert choice != SDPBackend.MATH
    if torch.cuda.get_device_capability()[0] in (9, 10):
        assert choice == SDPBackend.CUDNN_ATTENTION
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    F.scaled_dot_product_attention(query, key, value, is_causal=True).square().sum().backward()
    # gradients, their conversions and the kernel's float32 accumulators, all of them linear in the length
    assert torch.cuda.max_memory_allocated() - before < 12 * (query.nbytes + key.nbytes + value.nbytes)


def test_compiled_attention_equals_eager():
    model = load_ours("deepseek_v3", dtype=torch.bfloat16).cuda()
    layer = model.model.layers[0].self_attn
    x = torch.randn(2, 64, model.config.hidden_size, device="cuda").bfloat16().requires_grad_()
    turn = model.model.rotary_emb(x, torch.arange(64, device="cuda")[None])

    def found(run, x, turn):
        out = run(x, turn, None)[0]
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [x, *run.parameters()])]

    wide = copy.deepcopy(layer).float()
    exact = found(wide, x.detach().float().requires_grad_(), tuple(part.float() for part in turn))
    eager, compiled = found(layer, x, turn), found(torch.compile(layer), x, turn)
    for want, plain, got in zip(exact, eager, compiled, strict=True):
        assert (got - want).norm() <= 1.5 * (plain - want).norm() + 1e-3 * want.norm()


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_step_never_waits(use_cache):
    model = load_ours("deepseek_v3", dtype=torch.bfloat16).cuda().train()
    ids = torch.randint(3, model.config.vocab_size, (2, 64), device="cuda")

    def step():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=use_cache).loss
        loss.backward()
        return loss.detach()

    first = step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(first, second, rtol=1e-3, atol=0)
