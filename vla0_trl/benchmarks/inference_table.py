"""The table of eval/bench_inference.py: its models, rows, columns and ratios. Nothing here imports torch."""

from vla0_trl.config import NANO

VARIANTS = {"a": "stock, digits and spaces", "b": "stock, xgrammar", "c": "ours", "d": "ours, drafts", "d±": "jitter"}
VARIANTS |= {"p": "ours, parallel"}
RATIOS = {"ours_vs_stock": ("a", "c"), "drafts_vs_stock": ("a", "d"), "ours_vs_xgrammar": ("b", "c")}
RATIOS |= {"parallel_vs_stock": ("a", "p"), "parallel_vs_ours": ("c", "p")}
SEED = 1  # with it, nano's answers differ and are as long as a trained one's; with 0, all are the same number
# Hub id, image side, steps of a chunk, width of an action (PushT's for nano, LIBERO's for the others)
MODELS = {
    NANO: (None, 96, 10, 2),
    "smolvlm2-500m": ("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", 512, 8, 7),
    "qwen2.5-vl-3b": ("Qwen/Qwen2.5-VL-3B-Instruct", 224, 8, 7),
}
TITLES = {"median_ms": "ms/chunk", "p95_ms": "p95", "chunks_per_s": "chunks/s", "hz_n_step": "Hz, n-step"}
TITLES |= {"hz_requery": "Hz, re-query", "passes_per_chunk": "passes", "of_floor": "x floor"}
TITLES |= {"acceptance": "accepted", "other_answers": "differ"}


def ratios(rows: list[dict]) -> dict[str, float]:
    """Of median times; a key is there if both of its variants are."""
    times = {(row["variant"], row["batch"]): row["median_ms"] for row in rows}
    found = {
        f"{name}_b{size}": times[slow, size] / times[fast, size]
        for name, (slow, fast) in RATIOS.items()
        for size in sorted({size for _, size in times})
        if (slow, size) in times and (fast, size) in times
    }
    return found | {f"of_floor_b{row['batch']}": row["of_floor"] for row in rows if row["variant"] == "c"}


def print_table(name: str, size: int, table: list[dict]) -> None:
    print(f"{f'{name}, batch {size}':30s}" + "".join(f"{title:>13s}" for title in TITLES.values()))
    for row in table:
        cells = ("-" if row[key] is None else f"{row[key]:.2f}" for key in TITLES)
        print(f"({row['variant']}) {VARIANTS[row['variant']]:26s}" + "".join(f"{cell:>13s}" for cell in cells))
