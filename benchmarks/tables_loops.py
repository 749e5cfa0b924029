"""The tables of people's own loops, whole steps, from every result of `expertmesh bench --loop` there is."""

from tables_shared import results_with, source, table

OURS, OWN_TRAINER = "expertmesh", "expertmesh-trainer"
Place = tuple[str, int, str, int, int]  # work, layers, loop, batch, seq


def places(result: dict) -> dict[Place, dict[str, dict]]:
    """The rows of every work, loop and batch, by arm."""
    found: dict[Place, dict[str, dict]] = {}
    for row in result["rows"]:
        place = row["work"], row["layers"], row["loop"], row["batch"], row["seq"]
        found.setdefault(place, {})[row["arm"]] = row
    return found


def loops_table(result: dict) -> str:
    """Stock, its best arm and ours: a table for each work of a result."""
    tables: dict[tuple[str, int], list[list]] = {}
    for place, arms in places(result).items():
        tables.setdefault(place[:2], []).append(_cells(result, place, arms))
    header = ["loop", "rows", "stock ms", "best stock arm ms", "ours ms", "our trainer ms", "against stock"]
    header += ["against best", "peak GiB: stock", "best", "ours"]
    title = "{}, {} layers:\n\n" if len(tables) > 1 else ""
    return "\n\n".join(title.format(*work) + table(header, cells) for work, cells in tables.items())


def _cells(result: dict, place: Place, arms: dict[str, dict]) -> list:
    _, _, loop, batch, seq = place
    stocks = [row for name, row in arms.items() if name.startswith("stock")]
    best = min(stocks, key=lambda row: row["step_ms"], default=None)
    stock, ours, trained = (arms.get(name) for name in ("stock", OURS, OWN_TRAINER))

    def ms(name: str) -> str:
        return str(arms[name]["step_ms"]) if name in arms else why(result, place, name)

    def times(row: dict | None) -> str:
        ratios = [f"{row['step_ms'] / mine['step_ms']:.2f}x" for mine in (ours, trained) if row and mine]
        return " / ".join(ratios)

    named = "" if best is None else f"{best['step_ms']} ({best['arm'].removeprefix('stock-')})"
    memory = ["" if row is None else row["peak_gib"] for row in (stock, best, ours or trained)]
    cells = [loop, f"{batch} x {seq}", ms("stock"), named, ms(OURS), ms(OWN_TRAINER)]
    return [*cells, times(stock), times(best), *memory]


def why(result: dict, place: Place, arm: str) -> str:
    """What stands for an arm without a row: nothing if it was not to run."""
    work, _, loop, batch, seq = place
    for failure in result["failed"]:
        if (failure["work"], failure["arm"], failure["what"]) == (work, arm, f"{loop}, {batch} x {seq}"):
            return "out of memory" if failure["error"].startswith("OutOfMemoryError") else "failed"
    return ""


def every_arm_table(result: dict) -> str:
    """All arms, with how far their steps are apart and what they lost."""
    cells = [
        [loop, f"{batch} x {seq}", arm, row["step_ms"], f"{min(row['steps_ms'])} to {max(row['steps_ms'])}"]
        + [f"{row['tokens_per_second']:,}", row["peak_gib"], " ".join(f"{loss:.3f}" for loss in row["losses"])]
        for (_, _, loop, batch, seq), arms in places(result).items()
        for arm, row in arms.items()
    ]
    return table(["loop", "rows", "arm", "step ms", "of all steps", "tokens/s", "peak GiB", "losses"], cells)


def what(result: dict) -> str:
    """The works and GPUs of one result, as a line above its table."""
    works = dict.fromkeys((row["work"], row["layers"]) for row in result["rows"])
    gpus = "one GPU" if result["gpus"] == 1 else f"{result['gpus']} GPUs"
    return f"{'; '.join(f'{work} widths, {layers} layers' for work, layers in works)}, {gpus}:"


def readme_of_loops() -> str:
    """The README's tables; nothing before the first result."""
    parts = [f"{what(result)}\n\n{loops_table(result)}\n\n{source(result)}" for result in results_with("loop")]
    if not parts:
        return ""
    head = """Whole training steps of people's own loops, by wall clock, medians: transformers' `Trainer`, TRL's
`SFTTrainer` and `DPOTrainer`, PEFT's LoRA. `stock` is stock Transformers, beside its best arm in the same job;
`ours` changes the import line and nothing else, `our trainer` takes `expertmesh.Trainer` or `SFTTrainer` as well.
Ratios are those of both ([the loops](docs/bench.md#peoples-loops), [all arms, forward and
backward alone, other families, two and four GPUs](docs/benchmarks.md))."""
    return "\n\n".join([head, *parts]) + "\n\n"


def loops_section() -> str:
    """The section of docs/benchmarks.md; nothing before the first result."""
    results = results_with("loop")
    if not results:
        return ""
    tables = [f"{what(result)}\n\n{every_arm_table(result)}\n\n{source(result)}" for result in results]
    return f"""## People's own loops, whole steps

Wall clock from the end of a step to the end of the next, medians; losses of the first three steps and of the last. What
the loops and the arms are stands in [bench.md](bench.md#peoples-loops).

{(chr(10) * 2).join(tables)}

"""
