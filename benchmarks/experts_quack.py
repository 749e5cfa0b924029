"""The experts' six matrix products by quack-kernels (CuTe-DSL on Hopper and Blackwell), for benchmarks/experts.py.

Each computes what our kernel of that name computes, with the same things fused: rows gathered by index, SwiGLU in the
epilogue, its gradient and that of the routing weights as well. Two differences: gate and up columns alternate in its h
and dh (the weights stay in halves, as Transformers has them), and `down_dact` also adds up the parts of the routing
weights' gradient.

A first call compiles for some seconds; quack keeps that in $QUACK_CACHE_DIR. Its packages must lie in a folder called
site-packages.
"""

from functools import partial

import torch

from expertmesh.kernels import quack
from expertmesh.kernels.grouped_down import halves_of

# those that expertmesh chooses from, and others that come near, for what it leaves to Triton too
TILES = {
    "up_act": (quack.UP, quack.Tile(64, 256, True, 2, 1)),
    "down": quack.ROWS,
    "down_dact": (quack.Tile(128, 128, True, 2, 1),),
    "up_dgrad": quack.ROWS,
    "up_wgrad": quack.WGRAD,
    "down_wgrad": quack.WGRAD,
}


def label(tile):
    kind = " pingpong" if tile.pingpong else " dynamic"
    return f"{tile.rows}x{tile.columns}{kind}, cluster {tile.below}x{tile.beside}"


def pairs(h_SJ):
    """Columns [gate | up] in turns."""
    return torch.stack(h_SJ.chunk(2, dim=1), dim=2).flatten(1)


def kernels(o):
    """name -> (function of a tile that computes, function that brings its results into our kernel's order and layout).

    o: `experts.Operands`.
    """
    bounds = o.group.bounds
    gathered = {"cu_seqlens_m": bounds, "A_idx": o.group.token_S}
    h_pairs_SJ = pairs(o.h_SJ)

    def up_act(tile):
        from quack.gemm_interface import gemm_act

        options = {"dynamic_scheduler": tile.dynamic, "tuned": False, "config": quack.config(tile)}
        return gemm_act(o.x_TH, o.w_up_EHJ, activation="swiglu", concat_layout=("B",), **options, **gathered)

    def down_dact(tile):
        from quack.gemm_interface import gemm_dact

        options = {"dynamic_scheduler": tile.dynamic, "tuned": False, "config": quack.config(tile)}
        weights = {"activation": "swiglu", "colvec_scale": o.group.weight_S, "colvec_reduce": True}
        return gemm_dact(o.dout_TH, o.w_down_EIH.transpose(1, 2), h_pairs_SJ, **weights, **options, **gathered)

    def down(tile):
        y_SH = o.h_SJ.new_empty(len(o.h_SJ), o.x_TH.shape[1])
        return quack.gemm(tile, o.a_SI, o.w_down_EIH.transpose(1, 2), y_SH, cu_seqlens_m=bounds)

    def up_dgrad(tile):
        dx_SH = o.h_SJ.new_empty(len(o.h_SJ), o.x_TH.shape[1])
        return quack.gemm(tile, o.h_SJ, o.w_up_EHJ, dx_SH, cu_seqlens_m=bounds)

    def wgrad(tile, g_TG, c_SC, dw_EGC):
        return quack.gemm(tile, g_TG.t(), c_SC.t(), dw_EGC, cu_seqlens_k=bounds, A_idx=o.group.token_S)

    def up_wgrad(tile):
        dw_EJH = torch.empty_like(o.w_up_EHJ.transpose(1, 2))
        wgrad(tile, o.x_TH, o.h_SJ, dw_EJH.transpose(1, 2))
        return dw_EJH

    def down_wgrad(tile):
        return wgrad(tile, o.dout_TH, o.a_SI, torch.empty_like(o.w_down_EIH.transpose(1, 2)))

    return {
        "up_act": (up_act, lambda found: (halves_of(found[0]), found[1])),
        "down": (down, lambda y: (y,)),
        "down_dact": (down_dact, lambda found: (halves_of(found[0]), *found[1:])),
        "up_dgrad": (up_dgrad, lambda dx: (dx,)),
        "up_wgrad": (up_wgrad, lambda dw: (dw,)),
        "down_wgrad": (down_wgrad, lambda dw: (dw,)),
    }


def best(name, o, ours, flops, time):
    """{"ms", "tflops", "config"} of the fastest tile of one kernel and {"tried": every tile's time or error}.

    ours: what our kernel returns. time: function of a call to its milliseconds.
    """
    compute, in_our_layout = kernels(o)[name]
    tried = [_try(partial(compute, tile), in_our_layout, ours, time) | {"config": label(tile)} for tile in TILES[name]]
    right = [entry for entry in tried if "ms" in entry]
    found = {"tried": tried}
    if right:
        fastest = min(right, key=lambda entry: entry["ms"])
        found = {**fastest, "tflops": round(flops / fastest["ms"] / 1e9, 1), **found}
    return found


def _try(run, in_our_layout, ours, time):
    try:
        errors = [relative_error(*pair) for pair in zip(in_our_layout(run()), ours, strict=True)]
        if not all(error < 1e-2 for error in errors):
            return {"failed": f"differs from ours by {', '.join(f'{error:.1e}' for error in errors)}"}
        return {"ms": round(time(run), 3)}
    except Exception as error:  # other people's kernels: what they refuse is part of the result
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:150]}


def relative_error(found, expected):
    assert found.shape == expected.shape, f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
    expected = expected.float()
    return ((found.float() - expected).norm() / expected.norm()).item()
