"""Write docs/families.md from the fusion reports of real, tiny models; nothing in its tables is typed by hand.

PYTHONPATH=src python scripts/families.py

The page claims the same tables for the oldest and the newest Transformers: tests/scripts/test_families.py compares it
with what each of them gives, under `make test` and `make test-oldest`.
"""

from pathlib import Path
from typing import Any

from expertmesh import AutoModelForCausalLM, backends
from expertmesh.bench.tiny import FAMILIES, tiny_config
from expertmesh.families.report import FUSIONS, NOT_NEEDED

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
BY_HAND = {
    "qwen3_moe": "Qwen3-MoE, Qwen3-Coder",
    "nemotron_h": "Nemotron 3",
    "gpt_oss": "GPT-OSS",
    "deepseek_v3": "DeepSeek V3, R1",
}
GENERIC = {
    "mixtral": "Mixtral",
    "olmoe": "OLMoE",
    "glm4_moe": "GLM-4.5",
    "qwen3_next": "Qwen3-Next",
    "qwen3_5_moe_text": "Qwen3.5-MoE",
    "ernie4_5_moe": "ERNIE 4.5",
    "granitemoe": "Granite 3 MoE",
    "hunyuan_v1_moe": "Hunyuan-A13B",
    "phimoe": "Phi-3.5-MoE",
    "qwen2_moe": "Qwen2-MoE",
    "deepseek_v2": "DeepSeek V2",
    "dots1": "dots.llm1",
    "flex_olmo": "FlexOlmo",
    "minimax_m2": "MiniMax M2",
    "aria_text": "Aria",
    "jamba": "Jamba",
}
WHAT = {
    "experts": "all experts of a layer in grouped GEMMs that gather their rows and include the activation",
    "router": "from logits to weights and expert ids in one kernel",
    "rms_norm": "RMSNorm in one kernel forward and one backward",
    "swiglu": "`silu(gate) * up`, or `relu(x)^2`, of dense and shared MLPs in one kernel",
    "mla_rope": "latent attention (MLA): RoPE of queries and the shared key, and assembly of keys, in one kernel",
    "qk_norm_rope": "norms of each query and key head and RoPE in one kernel",
    "rope": "RoPE in one kernel, where neither of the two above applies",
    "sink_attention": "attention with sinks, full and sliding-window, without a materialized mask, and its RoPE",
    "add_norm": "residual adds fused into the norm after attention and into the experts' last kernel or product",
    "mamba2": "Mamba2's convolution, scan and gated norm in Triton, separate for each packed document",
    "linear_cross_entropy": "the loss from hidden states; training never holds the logits",
}
HEAD = f"""# Model families

Written by `python scripts/families.py`, which builds a tiny model of each family and asks it for its `fusion_report()`.
A class gets a fast twin only if a fingerprint of its code shows that the twin computes the same; all other classes run
Transformers' code. [Add a family](add-a-family.md) shows how to add rules.

The tables are the same on Transformers {backends.OLDEST} and {backends.NEWEST}: a test compares them with both.

For every family in these tables, tests check that loss, logits and all gradients equal stock Transformers' to 1e-5 in
float32, that stock Transformers loads the saved model bit for bit, and that two ranks with expert parallelism give the
gradients of one process.
"""
TAIL = """
## Models without experts

Llama, Qwen3 and all others without experts stay stock Transformers, and the log says so. On a GPU
`TrainingArguments(use_liger_kernel=True)`, of Transformers and TRL, gives them the kernels of
[Liger](https://github.com/linkedin/Liger-Kernel), if that knows the model type.

## All others

Any Mixture-of-Experts model of Transformers whose experts are behind its `ExpertsInterface` gets the fast experts,
expert parallelism and the loss head, and the fusions for code that it shares with a family above. A model whose
experts are not behind this interface is treated as a model without experts.

## What no fusion covers

- Qwen3-Next and Qwen3.5: the linear-attention layers run Transformers' code. It calls flash-linear-attention and
  causal-conv1d if they are installed, and is slow otherwise.
- Phi-3.5-MoE: in training the router samples experts at random, and the norms are LayerNorms. Its expert parallelism is
  tested without this noise.
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def reports(families: dict[str, str]) -> dict[str, dict[str, Any]]:
    """For each family the rows of its tiny model's report, by fusion."""
    models = {name: AutoModelForCausalLM.from_config(tiny_config(name)) for name in families}
    return {name: {row.name: row for row in model.fusion_report()} for name, model in models.items()}


def cell(row: Any) -> str:
    """`on`, `off`, `part` (some modules stay stock), or a dash where there is nothing to do."""
    if row.on:
        return "part" if row.reason else "on"
    return "–" if row.reason.startswith(NOT_NEEDED) else "off"


def overview(families: dict[str, str], found: dict[str, dict[str, Any]]) -> str:
    rows = [[f"{families[name]} (`{name}`)", *(cell(found[name][f]) for f in FUSIONS)] for name in families]
    return table(["family", *(f"`{f}`" for f in FUSIONS)], rows)


def why_not(found: dict[str, dict[str, Any]]) -> str:
    """One row for each fusion and reason, with the classes it holds for."""
    classes: dict[tuple[str, str], dict[str, None]] = {}
    for report in found.values():
        for fusion in FUSIONS:
            for reason in filter(None, report[fusion].reason.split("; ")):
                cls, _, text = reason.replace(": ", " ", 1).partition(" ")
                if not reason.startswith(NOT_NEEDED):
                    classes.setdefault((fusion, text), {})[f"`{cls}`"] = None
    rows = [[f"`{fusion}`", text, ", ".join(names)] for (fusion, text), names in classes.items()]
    return table(["fusion", "why a class stays stock", "classes"], sorted(rows, key=lambda row: row[0]))


def page() -> str:
    """The text of docs/families.md."""
    by_hand, generic = reports(BY_HAND), reports(GENERIC)
    return (
        "\n".join(
            [
                HEAD,
                "## Tuned by hand\n",
                overview(BY_HAND, by_hand),
                "\n## By shared code\n",
                overview(GENERIC, generic),
                "\n`part`: some of the modules stay stock. A dash: the model has nothing that the fusion is for.\n",
                table(["fusion", "what it does"], [[f"`{name}`", WHAT[name]] for name in FUSIONS]),
                "\n## Why not\n",
                why_not(by_hand | generic),
                TAIL,
            ]
        ).rstrip("\n")
        + "\n"
    )


assert set(FAMILIES) == {*BY_HAND, *GENERIC}, "every family with a tiny model is on the page"

if __name__ == "__main__":
    PAGE.write_text(page())
