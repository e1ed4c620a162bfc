"""Peak memory of 4, 16 and 64 simulated clients on a base of about 110 M parameters: one base, many adapters.

    python benchmarks/memory.py
    python benchmarks/memory.py --blocks        # 64 clients in blocks of 8 -> memory_blocks.md
    python benchmarks/memory.py --blocks cuda   # the same on a GPU -> memory_blocks_cuda.md

Each number of clients runs in a process of its own (random LLaMA weights from a config, LoRA r=8 on q and v, one
client trained at a time, as on a machine that is short of memory) and reports the peak resident memory. Writes
benchmarks/results/memory.md. `--blocks` compares the peak with what must be there: the runtime, the base, and 8
adapters with their gradients and two moments, as counted, and the activations of a plain peft step on the same
8 x 2 x 64 tokens, as measured in a process of its own. Two measures: what is allocated (malloc's count, looked at every
2 ms; on a GPU torch's), and what is resident (on a GPU reserved), which counts what the allocator keeps as well.
"""

import ctypes
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).parent.parent
CLIENTS = (4, 16, 64)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048,
    "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 32000,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": True,
}  # fmt: skip


def job(folder: Path, clients: int) -> dict[str, Any]:
    return {
        "model": {"name": str(folder / "model"), "random": True},
        "adapter": {"lora": {"rank": 8, "targets": ["q_proj", "v_proj"]}},
        "task": {"causal_lm": {"max_length": 64}},
        "data": {
            "train": str(ROOT / "examples/data/medquad/train.jsonl"),
            "test": str(ROOT / "examples/data/medquad/test.jsonl"),
            "limit": 64 * 2,
            "split": {"iid": {"clients": clients}},
        },
        "local": {"lr": 1e-3, "batch": 2, "steps": 1},
        "rounds": 2,
        "evaluate": {"every": 0, "on": ["loss"], "batch": 4},
        "baselines": [],
    }


def one(folder: Path, clients: int) -> None:
    """Run in this process and print the figures as JSON."""
    import weft
    from weft.journal import read

    run = weft.run(weft.Job(**job(folder, clients)), folder / f"run-{clients}", block=1)
    facts = run.results["adapter"]
    rows = read(run.folder / "journal.jsonl")
    print(
        json.dumps(
            {
                "clients": clients,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "base_mb": (facts["total"] - facts["trainable"]) * 4 / 2**20,
                "adapter_mb": facts["trainable"] * 4 / 2**20,
                "seconds_a_round": sum(row["seconds"]["round"] for row in rows if "seconds" in row) / 2,
            }
        )
    )


def blocks_job(folder: Path) -> dict[str, Any]:
    """Return a job of 64 clients whose every token is learned, 64 to an example."""
    rows = [{"text": f"This is number {i}. " * 30} for i in range(64 * 2)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = job(folder, 64)
    values["data"] |= {"train": str(folder / "text.jsonl"), "test": str(folder / "text.jsonl"), "limit": None}
    values["evaluate"] |= {"every": 0, "examples": 1}
    return values | {"rounds": 1}


def peak() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Meter:
    """What this process allocates, and what it holds, in MB; at its highest, and now."""

    def __init__(self, device: str) -> None:
        self.cuda, self.most = device == "cuda", 0.0
        if not self.cuda:
            self._library = ctypes.CDLL(None)
            self._library.mallinfo2.restype = MallInfo
            threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.most = max(self.most, self.now()[0])
            time.sleep(0.002)

    def now(self) -> tuple[float, float]:
        if self.cuda:
            import torch

            return torch.cuda.memory_allocated() / 2**20, torch.cuda.memory_reserved() / 2**20
        info = self._library.mallinfo2()
        return (info.uordblks + info.hblkhd) / 2**20, peak()

    def highest(self) -> tuple[float, float]:
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated() / 2**20, torch.cuda.max_memory_reserved() / 2**20
        return self.most, peak()


FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class MallInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in FIELDS]


def plain(folder: Path, device: str) -> None:
    """Take two plain peft steps on the tokens of a block; print the memory before the model and of the activations."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    import weft.runs  # noqa: F401  (the same libraries in both processes)
    from weft.site.allocator import keep_freed_memory

    keep_freed_memory()
    (torch.ones(64, 64, requires_grad=True, device=device) @ torch.ones(64, 64, device=device)).sum().backward()
    meter = Meter(device)
    config = transformers.LlamaConfig.from_pretrained(folder / "model")
    words = transformers.AutoTokenizer.from_pretrained(folder / "model")
    net = transformers.LlamaForCausalLM(config).requires_grad_(False).to(device)
    model = get_peft_model(net, LoraConfig(r=8, target_modules=["q_proj", "v_proj"])).train()
    words("one text", verbose=False)
    base = meter.now()
    runtime = [held - sum(p.numel() for p in model.parameters()) * 4 / 2**20 for held in base]
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params)
    for _ in range(2):
        ids = torch.randint(3, 500, (8 * 2, 64), device=device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    own = 3 * sum(p.numel() for p in params) * 4 / 2**20
    activations = [most - before - own for most, before in zip(meter.highest(), base, strict=True)]
    print(json.dumps({"runtime": runtime, "activations": activations}))


def block(folder: Path, device: str) -> None:
    """Run a round of 64 clients in blocks of 8 in this process."""
    import weft

    meter = Meter(device)
    run = weft.run(weft.Job(**blocks_job(folder)), folder / "run-blocks", block=8, report=False)
    facts = run.results["adapter"]
    print(json.dumps({"peak": meter.highest(), "base": (facts["total"] - facts["trainable"]) * 4 / 2**20,
                      "adapter": facts["trainable"] * 4 / 2**20}))  # fmt: skip


def begun(command: list[str]) -> str:
    """Return what a process prints that begins as the command `weft` does."""
    from weft.site.allocator import tuned

    return subprocess.run(command, check=True, capture_output=True, text=True, env=tuned(os.environ)).stdout


def compare_blocks(device: str) -> None:
    """Write what a block of 8 must hold, and what the process held."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for kind in ("plain", "block"):
            command = [sys.executable, __file__, name, kind, device]
            printed = begun(command)
            found |= json.loads(printed.strip().splitlines()[-1])
    parts = {
        "runtime (python, torch, transformers, peft, weft, the model's code and tokenizer)": found["runtime"],
        "base": [found["base"]] * 2,
        "8 adapters, each with its gradient and two moments": [8 * 4 * found["adapter"]] * 2,
        "activations of a plain step on the same tokens": found["activations"],
    }
    whole = [sum(column) for column in zip(*parts.values(), strict=True)]
    above = [f"{most / need - 1:+.1%}" for most, need in zip(found["peak"], whole, strict=True)]
    rows = parts | {"**sum**": whole, "**peak of 64 clients in blocks of 8**": found["peak"]}
    lines = [f"| {part} | {allocated:.0f} | {held:.0f} |" for part, (allocated, held) in rows.items()]
    held, where = ("reserved", "_cuda") if device == "cuda" else ("resident", "")
    text = (
        "# Memory of blocks\n\nA LLaMA of 110 M parameters, LoRA r=8 on q and v, AdamW, 64 clients in blocks of 8, "
        f"2 x 64 tokens a client; MB. The peak is {above[0]} of the sum in what is allocated, {above[1]} in what is "
        f"{held} (wanted: within 10 %). Machine: {platform.machine()}, {os.cpu_count()} cores. Written by `python "
        f"benchmarks/memory.py --blocks`.\n\n| part | allocated | {held} |\n|---|---|---|\n" + "\n".join(lines) + "\n"
    )
    (ROOT / f"benchmarks/results/memory_blocks{where}.md").write_text(text, encoding="utf8")
    print(text)


def prepare(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = ROOT / "examples/models/stories260K" / name
        (folder / "model" / name).write_bytes(source.read_bytes())


def main() -> None:
    if sys.argv[1:2] == ["--blocks"]:
        compare_blocks((sys.argv[2:] or ["cpu"])[0])
        return
    if sys.argv[2:3] in (["plain"], ["block"]):
        {"plain": plain, "block": block}[sys.argv[2]](Path(sys.argv[1]), sys.argv[3])
        return
    if len(sys.argv) == 3:
        one(Path(sys.argv[1]), int(sys.argv[2]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for clients in CLIENTS:
            command = [sys.executable, __file__, name, str(clients)]
            printed = begun(command)
            rows.append(json.loads(printed.strip().splitlines()[-1]))
            print(rows[-1], flush=True)
    growth = rows[-1]["peak_mb"] - rows[0]["peak_mb"]
    share = growth / rows[0]["base_mb"]
    lines = [
        f"| {row['clients']} | {row['peak_mb']:.0f} | {row['base_mb']:.0f} | {row['adapter_mb']:.2f} "
        f"| {row['seconds_a_round']:.1f} |"
        for row in rows
    ]
    text = (
        "# Memory: one base, many adapters\n\n"
        f"From {CLIENTS[0]} to {CLIENTS[-1]} clients the peak grows by {growth:.1f} MB, {share:.1%} of the base "
        f"(wanted: under 5 %). Machine: {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}.\n\n"
        "| clients | peak resident MB | base MB | one adapter MB | seconds a round |\n|---|---|---|---|---|\n"
    )
    (ROOT / "benchmarks/results").mkdir(exist_ok=True)
    (ROOT / "benchmarks/results/memory.md").write_text(text + "\n".join(lines) + "\n", encoding="utf8")
    print(f"growth {growth:.1f} MB = {share:.1%} of the base")
    if share >= 0.05:
        sys.exit(1)


if __name__ == "__main__":
    main()
