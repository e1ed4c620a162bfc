"""Peak memory of 4, 16 and 64 simulated clients on a base of about 110 M parameters: one base, many adapters.

    python benchmarks/memory.py

Each number of clients runs in a process of its own (random LLaMA weights from a config, LoRA r=8 on q and v, one
client trained at a time, as on a machine that is short of memory) and reports the peak resident memory. Writes
benchmarks/results/memory.md.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CLIENTS = (4, 16, 64)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048,
    "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 32000,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": True,
}  # fmt: skip


def job(folder: Path, clients: int) -> dict:
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


def prepare(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = ROOT / "examples/models/stories260K" / name
        (folder / "model" / name).write_bytes(source.read_bytes())


def main() -> None:
    if len(sys.argv) == 3:
        one(Path(sys.argv[1]), int(sys.argv[2]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for clients in CLIENTS:
            command = [sys.executable, __file__, name, str(clients)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
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
