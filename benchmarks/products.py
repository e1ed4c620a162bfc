"""Products with frozen weights: torch's own way (MKL on x86) against oneDNN, in turns, on one thread.

    python benchmarks/products.py

GFLOP/s, medians of 25 in turns and the best of them; `backward` is the gradient of the rows. Where torch's own is the
slower one, `weft.site.products` takes the other. Writes benchmarks/results/products.md.
"""

import platform
import statistics
import time
from pathlib import Path

import torch

from weft.site.allocator import keep_freed_memory
from weft.site.products import _faster, _product

PAGE = Path(__file__).parent / "results/products.md"
SHAPES = [(64, 512, 512), (300, 512, 512), (2048, 512, 512), (2048, 512, 1376), (2048, 1376, 512), (1003, 768, 2048)]
"""Rows, columns in, columns out."""


def main() -> None:
    """Measure each shape and write the page."""
    torch.set_num_threads(1)
    keep_freed_memory()
    lines = []
    for rows, wide, out in SHAPES:
        x, weight, grad = torch.randn(rows, wide), torch.randn(out, wide), torch.randn(rows, out)
        ways = {
            "torch": lambda x=x, w=weight: torch.nn.functional.linear(x, w),
            "oneDNN": lambda x=x, w=weight: _product(x, w, None),
            "torch, backward": lambda g=grad, w=weight: g @ w,
            "oneDNN, backward": lambda g=grad, w=weight: _product(g, w.t(), None),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(25):
            for name, way in ways.items():
                begun = time.perf_counter()
                way()
                taken[name].append(time.perf_counter() - begun)
        work = 2e-9 * rows * wide * out
        cells = [f"{work / statistics.median(seen):.0f} ({work / min(seen):.0f})" for seen in taken.values()]
        lines.append(f"| {rows} x {wide} by {out} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    PAGE.write_text(
        "# Products with frozen weights\n\n"
        f"Machine: {platform.machine()}, torch {torch.__version__}, one thread; Weft takes "
        f"{'oneDNN' if _faster() else 'torch'}'s way on it. GFLOP/s, medians of 25 in turns, the best in brackets. "
        "Written by `python benchmarks/products.py`.\n\n"
        f"| shape | {' | '.join(taken)} |\n|---|---:|---:|---:|---:|\n" + "\n".join(lines) + "\n",
        encoding="utf8",
    )


if __name__ == "__main__":
    main()
