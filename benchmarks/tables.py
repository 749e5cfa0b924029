"""Write docs/benchmarks.md, docs/profile.md and the README's tables from benchmarks/results.

No figure in a table is typed by hand; sentences beside the tables are: read them after a new result.

python benchmarks/tables.py        # needs expertmesh and matplotlib for the pictures

The tables of people's loops are in tables_loops.py, those of several GPUs in tables_gpus.py, what all share in
tables_shared.py.
"""

from collections.abc import Callable

from tables_gpus import qwen_on_two_gpus, steps_on_four_gpus
from tables_loops import loops_section, readme_of_loops
from tables_shared import ROOT, WITHOUT, load, measured, source, step_table, table, times_table

from expertmesh.bench.works import WORKS

BEGIN, END = "<!-- from benchmarks/results: begin -->", "<!-- from benchmarks/results: end -->"


def shown(result: dict, work: str, later: dict) -> bool:
    """Whether the rows of a work are shown from this result: those that a later job has too are shown from that."""
    return result is later or all(row["work"] != work for row in later["rows"])


def worth_table(rows: list[dict]) -> str:
    """The time of a step without each fusion over that of expertmesh with all, families and batches side by side."""
    whole = {(row["work"], row["batch"]): row["step_ms"] for row in rows if row["arm"] == "expertmesh"}
    worth: dict[str, dict[tuple[str, int], str]] = {}
    for row in rows:
        if row["arm"].startswith(WITHOUT):
            place = row["work"], row["batch"]
            worth.setdefault(row["arm"].removeprefix(WITHOUT), {})[place] = f"{row['step_ms'] / whole[place]:.3f}"
    cells = [[f"`{name}`", *(found.get(place, "") for place in whole)] for name, found in worth.items()]
    return table(["without", *(f"{work}, {batch} x {rows[0]['seq']}" for work, batch in whole)], cells)


def parity_text(result: dict, work: str) -> str:
    """How far the gradients of one work are from float32."""
    found = result["parity"][work]
    ours, stock, layers = found["expertmesh"], found["stock"], WORKS[work].proof_layers
    where = f" (`{ours['worst_tensor']}`)" if "worst_tensor" in ours else ""
    return f"""Against a float32 run of stock Transformers ({layers} layers, 2,048 tokens, same weights), the loss in
bfloat16 is off by {stock["loss_error"]:.1e} on the stock side and {ours["loss_error"]:.1e} on ours; over all
parameters, our gradient error is at most {ours["worst_ratio"]:.2f} times stock's{where}.

{source(result)}"""


def section(name: str) -> str:
    """The section made of one result of `SECTIONS`; nothing where that has not been measured."""
    if not measured(name):
        return ""
    result, (title, text, show) = load(name), SECTIONS[name]
    return f"## {title}\n\n{text}\n\n{show(result)}\n\n{source(result)}\n\n"


def component_table(profile: dict) -> str:
    """Milliseconds of each component beside its floor, one step of one arm."""
    rows = [
        [row["component"], row["ms"], row["floor_ms"] or "", _times(row["ms"], row["floor_ms"])]
        + [row["launches"], row["floor"]]
        for row in profile["components"]
    ]
    ms, floor = (sum(row[key] for row in profile["components"]) for key in ("ms", "floor_ms"))
    launches = sum(row["launches"] for row in profile["components"])
    rows.append(["**all**", f"{ms:.3f}", f"{floor:.3f}", _times(ms, floor), launches, ""])
    return table(["component", "ms", "floor ms", "times the floor", "launches", "floor is"], rows)


def _times(ms: float, floor: float) -> str:
    return f"{ms / floor:.2f}" if floor else ""


def profile_page(result: dict) -> str:
    """docs/profile.md from a result of `expertmesh bench --profile`."""
    sections = []
    for what, arms in result["profiles"].items():
        for arm, profile in arms.items():
            sections.append(
                f"""## {what} routing, {profile["layers"]} layers, {profile["batch"]} x {profile["seq"]} tokens: {arm}

Forward and backward took {profile["forward_and_backward_ms"]} ms where steps are queued one behind the other; the
profile is of a single step, on a GPU that has just been idle and clocks higher.

{component_table(profile)}"""
            )
    rates = result["ceilings"]
    return f"""# Where each millisecond goes

Made by `python benchmarks/tables.py` from `benchmarks/results/h200_profile.json`: the device time of one training step
by component of the layers, beside the least that the component needs on this GPU: its FLOPs at the rate of a bfloat16
product of 8192 x 8192 matrices ({rates["gemm_tflops"]:.0f} TFLOP/s in this job), or the bytes it must move at the
rate of a copy ({rates["copy_tb_per_s"]:.2f} TB/s). F is a component's FLOPs of the forward ([formulas](bench.md)),
T the tokens, H the hidden size, V the vocabulary, S the rows of all experts of all layers. Kernels are traced to the
module they were launched for.

![Device time of one step by component](images/h200_profile-qwen3-30b-a3b-random-init-components.png)

{chr(10).join(section + chr(10) for section in sections)}
{source(result)}
"""


def experts_table(result: dict) -> str:
    header = ["arm", "tokens", "routing", "forward ms", "TFLOP/s", "forward + backward ms", "TFLOP/s"]
    keys = ("arm", "tokens", "routing", "forward_ms", "forward_tflops", "both_ms", "both_tflops")
    return table(header, [[row[key] for key in keys] for row in result["rows"]])


def kernels_text(result: dict) -> str:
    """Each grouped kernel of ours alone, beside quack's where the result has that."""
    text, header, rows = "", ["kernel", "ms", "TFLOP/s"], []
    if "libraries" in result:
        text = (
            f", and quack-kernels {result['quack-kernels']} with the best of a few tiles\n(in a layer it makes all but "
            "`down_dact`, with tiles that kernels/quack.py chooses)"
        )
        header = ["kernel", "ours ms", "TFLOP/s", "quack ms", "TFLOP/s", "ours / quack"]
    for name, ours in result["kernels"].items():
        rows.append([f"`{name}`", ours["ms"], ours["tflops"]])
        for library in result.get("libraries", {}).values():
            found = {"ms": "failed", "tflops": ""} | library.get(name, {})
            rows[-1] += [found["ms"], found["tflops"], f"{ours['ms'] / found['ms']:.2f}" if found["tflops"] else ""]
    return f"Each grouped kernel of ours at 16,384 tokens{text}:\n\n{table(header, rows)}"


def rest_table(short: dict, long: dict) -> str:
    """Our own kernels and whole layers of every arm, after a short and after a long rest."""
    rows = [
        [f"`{name}`", kernel["ms"], long["kernels"][name]["ms"], f"{kernel['ms'] / long['kernels'][name]['ms']:.2f}"]
        for name, kernel in short["kernels"].items()
    ]
    for before, after in zip(short["rows"], long["rows"], strict=True):
        assert all(before[key] == after[key] for key in ("arm", "tokens", "routing"))
        name = f"{before['arm']}, {before['tokens']}, {before['routing']}, both"
        rows.append([name, before["both_ms"], after["both_ms"], f"{before['both_ms'] / after['both_ms']:.2f}"])
    return table(["", "ms after 1 ms", "ms after 20 ms", "ratio"], rows)


def small_kernel_table(result: dict) -> str:
    arms = ["expertmesh", "liger", "torch.compile", "torch"]
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in result["rows"]:
        if row["pass"] != "both" or row["kernel"].startswith("linear"):
            times = cells.setdefault((row["kernel"], row["pass"]), {"floor": row["floor_ms"]})
            times[row["implementation"]] = row["ms"]
    rows = [[kernel, what, ms["floor"], *(ms.get(arm, "") for arm in arms)] for (kernel, what), ms in cells.items()]
    return table(["kernel", "pass", "floor ms", *arms], rows)


def packed_section() -> str:
    qwen, deepseek = load("h200_packed_qwen3_30b"), load("h200_packed_deepseek_v3")
    return f"""## Packed documents: Qwen3-30B-A3B and DeepSeek-V3 widths, one GPU, forward and backward

The models of the first tables; a row holds {qwen["rows"][0]["documents"]} documents of unequal length, and every arm is
told where they begin, by positions and by cumulative lengths. `stock` attends by SDPA, for which Transformers makes a
mask, `stock-flash-attn-4` by Transformers' own way to flash-attn-4, to which ours sends packed rows too where it is
installed.

{step_table(qwen)}

{source(qwen)}

{step_table(deepseek)}

{source(deepseek)}

The time of a step without flash-attn-4, by PyTorch's FlashAttention, over that with it, Qwen3 and DeepSeek:

{worth_table(qwen["rows"])}

{worth_table(deepseek["rows"])}

"""


def cpu_table(result: dict) -> str:
    stock = next(row for row in result["rows"] if row["arm"] == "stock")
    keys = ("arm", "forward_ms", "backward_ms", "both_ms", "both_shortest_ms")
    rows = [
        [*(row[key] for key in keys), f"{row['tokens_per_second']:,}", f"{stock['both_ms'] / row['both_ms']:.2f}x"]
        for row in result["rows"]
    ]
    header = ["arm", "forward ms", "backward ms", "both, median ms", "shortest ms", "tokens/s", "against stock"]
    return f"{table(header, rows)}\n\n{source(result)}"


def cpu_section(result: dict, without_avx512: dict) -> str:
    stock = next(row for row in result["rows"] if row["arm"] == "stock")
    return f"""## A small Qwen3-MoE on {result["threads"]} CPU threads, float32, forward and backward

{stock["layers"]} layers, hidden 256, 32 experts, top-4, width 128, vocabulary 4,096; {stock["batch"]} x {stock["seq"]}
tokens; the arms alternate step by step. Stock is Transformers' `grouped_mm` backend, `stock-eager` its loop over
experts. All arms multiply by MKL:

{cpu_table(without_avx512)}

With our products made by oneDNN, on a processor with AVX-512, as they were before that was removed:

{cpu_table(result)}
"""


ALONE = "h200_mamba", "h200_sink_attention", "h200_packed_attention", "h200_attention"
#: name of a result: title of its section, what it holds, how it is shown
SECTIONS: dict[str, tuple[str, str, Callable[[dict], str]]] = {
    "h200_nemotron_3_nano_mamba_ssm": (
        "The same, with the Triton kernels of mamba_ssm installed",
        "Stock then scans with mamba_ssm; its compiled convolution (causal_conv1d) was not there.", step_table),
    "h200_gpt_oss_20b": (
        "GPT-OSS-20B widths, 4 of 24 layers, one GPU, forward and backward",
        "Stock's attention is flex attention, ours flash-attn-4, in layers with a window our own.", step_table),
    "h200_first_step": (
        "The first training step, one GPU", "Wall time of forward and backward of a few layers in a new process, with\n"
        "empty caches of Triton, quack-kernels and flash-attn-4, and again with what that left: the difference is "
        "compiling.\nNothing tunes itself. `at once`: families in parallel.", times_table),
    "h200_x2_nemotron_3_nano": (
        "Nemotron-3-Nano, 26 of 52 layers, two GPUs, forward and backward", "Tokens per second are those of one GPU. "
        "`stock` and `expertmesh` are FSDP2, `-ep`\nhas `ep_size=2`, `-graph` is a recorded step.", step_table),
    "h200_mamba": (
        "Mamba2 alone, one GPU", "4 x 4,096 tokens at Nemotron-3-Nano widths, bfloat16; `mixer` is all between a "
        "layer's\nprojections. The floor is the bytes of the interface over 4.2 TB/s.", times_table),
    "h200_sink_attention": (
        "Attention with sinks, one GPU", "GPT-OSS's: 64 heads of queries, 8 of keys, width 64, bfloat16; `error` is "
        "the\ndistance of output and dq from ours, far where there are no sinks. `expertmesh` is our Triton kernels; "
        "where flash-attn-4\nis installed, layers without a window train by it. `packed` is one row of 16,384 tokens "
        "with 14 documents,\n`eager` one of 4,096.", times_table),
    "h200_packed_attention": (
        "Attention over packed documents, one GPU", "14 documents in a row of 16,384 tokens, bfloat16; `unpacked`: "
        "four rows of\n4,096. `expertmesh` is flash-attn-4 with the documents' boundaries, without it PyTorch's "
        "FlashAttention; `transformers`\nis SDPA with a mask.", times_table),
    "h200_attention": (
        "Causal attention of three families, one GPU", "`sdpa` is what PyTorch chooses by itself; bfloat16. Our models "
        "train\nby flash-attn-4 where it is installed.", times_table),
}  # fmt: skip


def page() -> str:
    step, experts, small = load("h200_qwen3_8_layers"), load("h200_experts"), load("h200_small_kernels")
    fusions = [load(f"h200_fusions_{name}") for name in ("qwen3_gpt_oss", "gpt_oss", "nemotron_deepseek")]
    nemotron, deepseek = load("h200_nemotron_3_nano"), load("h200_deepseek_v3")
    liger = next(row for row in step["rows"] if row["arm"] == "stock-liger")
    ablated = [row for result in fusions for row in result["rows"] if shown(result, row["work"], fusions[1])]
    new_tiles = [row for result in (step, load("h200_gpt_oss_20b"), nemotron, deepseek) for row in result["rows"]]
    profiled = load("h200_deepseek_profile")
    beside = section("h200_nemotron_3_nano_mamba_ssm") + section("h200_gpt_oss_20b")
    several = section("h200_x2_nemotron_3_nano") + steps_on_four_gpus()
    return f"""# Benchmarks

Made by `python benchmarks/tables.py` from the files in `benchmarks/results`, each of which holds its hardware,
versions, commit and command. Random weights and tokens, the model's own routing where nothing else is said; where a
table has both, stock Transformers and expertmesh ran in turn in one job. Our loss computes its gradients in the
forward, so that part of the backward is counted there. A table holds for the commit that its last line names, not for
what was changed since; if that commit is not in this repository's history, the line names the one with the same code.

{loops_section()}## Qwen3-30B-A3B widths, 8 of 48 layers, one GPU, forward and backward

{step_table(step)}

{source(step)}

{parity_text(load("h200_proof_qwen3_30b"), "qwen3-30b-a3b")}

Liger's kernels for experts tune themselves: stock's first step with them took {liger["first_step_s"]:.0f} s.
The CPU never waits for the GPU in a step of ours. Each column is explained in [bench.md](bench.md), and
[profile.md](profile.md) tells where the time goes.

## Nemotron-3-Nano widths, 13 layers (`MEMEM*EMEMEM*`), one GPU, forward and backward

{step_table(nemotron)}

{source(nemotron)}

Stock runs Mamba2 by PyTorch operations, as it does where mamba_ssm is not installed.

{beside}## DeepSeek-V3 widths, a dense and a Mixture-of-Experts layer, one GPU, forward and backward

{step_table(deepseek)}

{source(deepseek)}

256 experts of 4,096 tokens' choosing: 128 rows each on average, so reading their 22.5 GB of weights twice and writing
as many bytes of gradients bounds their time, not arithmetic. Where the time goes:

{component_table(profiled["profiles"]["deepseek-v3, random-init"]["expertmesh"])}

{source(profiled)}

{parity_text(load("h200_proof_deepseek_v3"), "deepseek-v3")}

## What each fusion and each library is worth, one GPU, forward and backward

The time of a step without it over that of a step with all; the layers are those of the tables above. Without
`rms_norm`, `qk_norm_rope` and `add_norm` are off as well; without quack-kernels or flash-attn-4, our own kernels and
PyTorch's attention do its work. Blank: off for that model.

{worth_table(ablated)}

{(chr(10) * 2).join(map(source, fusions))}

quack-kernels again, with tiles chosen by shape and taken as they are needed, in the jobs of the first tables:

{worth_table(new_tiles)}

{packed_section()}{section("h200_first_step")}{qwen_on_two_gpus()}{several}## The experts of one layer alone, one GPU

128 experts, top-8, widths 2,048 and 768, bfloat16; routing at random or skewed by Zipf's law. Stock is Transformers'
`grouped_mm` backend; `expertmesh-triton` is ours without quack-kernels. Rows of five calls, each after 20 ms of
clearing memory, in which a GPU at its limit of power recovers; the last table here is without that. In a model the
busiest expert of a random router gets several times the average ([bench.md](bench.md)).

{experts_table(experts)}

{kernels_text(experts)}

{source(experts)}

Right behind it on the same GPU, with 1 ms of clearing memory before a row instead of 20 (`up_act` to `down_wgrad`:
our Triton kernels):

{rest_table(load("h200_experts_without_rest"), experts)}

{source(load("h200_experts_without_rest"))}

## Small kernels, one GPU

Milliseconds at {small["sizes"]["tokens"]:,} tokens, width {small["sizes"]["hidden"]:,}, vocabulary
{small["sizes"]["vocab"]:,}, bfloat16. The floor is the bytes that must move over 4.25 TB/s, and for the loss its matrix
products at 788 TFLOP/s.

{small_kernel_table(small)}

{source(small)}

{"".join(map(section, ALONE))}{cpu_section(load("cpu_qwen3_moe"), load("cpu_qwen3_moe_avx2"))}"""


def readme() -> str:
    text = (ROOT / "README.md").read_text()
    block = f"{BEGIN}\n{readme_of_loops()}{END}"
    return text[: text.index(BEGIN)] + block + text[text.index(END) + len(END) :]


if __name__ == "__main__":
    from expertmesh.bench.pictures import draw

    draw(load("h200_profile"), ROOT / "docs" / "images" / "h200_profile")
    (ROOT / "docs" / "benchmarks.md").write_text(page())
    (ROOT / "README.md").write_text(readme())
    (ROOT / "docs" / "profile.md").write_text(profile_page(load("h200_profile")))
