"""Products with frozen weights: torch's own way (MKL on x86) against oneDNN, in turns, on one thread.

    python benchmarks/products.py

GFLOP/s of the processor's time, medians of 25 in turns; `backward` is the gradient of the rows. Where torch's own is
the slower one, `weft.core.products` takes the other. Writes benchmarks/results/products.md.
"""

import platform
from pathlib import Path

import torch
from engine import measure

from weft.core.products import faster, product
from weft.site.allocator import keep_freed_memory

PAGE = Path(__file__).parent / "results/products.md"
SHAPES = [
    (128, 256, 688), (64, 512, 512), (300, 512, 512), (2048, 512, 512), (2048, 512, 1376), (2048, 1376, 512),
    (1003, 768, 2048),
]  # fmt: skip
"""Rows, columns in, columns out."""


def row(rows: int, wide: int, out: int) -> str:
    """Measure one shape, both ways, forward and backward."""
    x, weight, grad = torch.randn(rows, wide), torch.randn(out, wide), torch.randn(rows, out)
    taken = measure(
        {
            "torch": lambda: torch.nn.functional.linear(x, weight),
            "oneDNN": lambda: product(x, weight, None),
            "torch, backward": lambda: grad @ weight,
            "oneDNN, backward": lambda: product(grad, weight.t(), None),
        },
        25,
    )
    speeds = [f"{2e-6 * rows * wide * out / milliseconds:.0f}" for milliseconds in taken.values()]
    return f"| {rows} x {wide} by {out} | {' | '.join(speeds)} |"


def main() -> None:
    """Measure each shape and write the page."""
    torch.set_num_threads(1)
    keep_freed_memory()
    lines = [row(*shape) for shape in SHAPES]
    PAGE.write_text(
        "# Products with frozen weights\n\n"
        f"Machine: {platform.machine()}, torch {torch.__version__}, one thread; Weft takes "
        f"{'oneDNN' if faster() else 'torch'}'s way on it. GFLOP/s, medians of 25 in turns. Written by `python "
        "benchmarks/products.py`.\n\n"
        "| shape | torch | oneDNN | torch, backward | oneDNN, backward |\n|---|---:|---:|---:|---:|\n"
        + "\n".join(lines)
        + "\n",
        encoding="utf8",
    )


if __name__ == "__main__":
    main()
