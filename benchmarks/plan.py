"""What `weft plan` says against what is measured: counts and cost of planning, and the peak memory of a real step.

    python benchmarks/plan.py
    python benchmarks/plan.py --counts    the first table alone, printed

Each shape runs in a process of its own, which begins as the command `weft` does: random weights from a config, one
client, three optimizer steps of the engine on whole batches, the peak resident memory above that of the imported
libraries. Writes benchmarks/results/plan.md.
"""

import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MIB = 2**20
LLAMA = {"model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
         "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 32000,
         "tie_word_embeddings": True}  # fmt: skip
BLOOM = {"model_type": "bloom", "hidden_size": 512, "n_layer": 8, "n_head": 8, "vocab_size": 50000}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
BERT = {"model_type": "bert"}
QV = {"lora": {"rank": 8, "targets": ["q_proj", "v_proj"]}}
Shape = tuple[str, dict[str, Any], Any, int, int, dict[str, Any]]
SHAPES: tuple[Shape, ...] = (  # name, config, adapter, batch, tokens, changes
    ("Llama 97 M, LoRA", LLAMA, QV, 4, 128, {}),
    ("Llama 97 M, LoRA, longer", LLAMA, QV, 8, 256, {}),
    ("Llama 97 M, LoRA, checkpointing", LLAMA, QV, 8, 256, {"checkpointing": True}),
    ("Llama 97 M, LoRA, bfloat16 base", LLAMA, QV, 4, 128, {"dtype": "bfloat16"}),
    ("Llama 97 M, full", LLAMA, "full", 2, 128, {}),
    ("Llama 97 M, prefix of 20", LLAMA, {"prefix": {"tokens": 20}}, 4, 128, {}),
    ("Bloom 51 M, LoRA", BLOOM, {"lora": {"rank": 8, "targets": ["query_key_value"]}}, 8, 128, {}),
    ("GPT-2 124 M, IA3", GPT2, "ia3", 4, 128, {}),
    ("BERT 109 M, LoRA, 20 classes", BERT, {"lora": {"rank": 8, "targets": ["query", "value"]}}, 16, 128, {}),
)
PLANNED = ("llama-2-7b", "bloom-7b1", "chatglm-6b", "llama-2-70b")


def shape(adapter: Any, batch: int, tokens: int, changes: dict[str, Any], classes: int) -> Any:
    """Return what decides the memory of a step."""
    import torch

    from weft import plugins
    from weft.plan.memory import Shape
    from weft.site.recipe import Recipe

    ids = torch.randint(5, 1000, (tokens,), generator=torch.Generator().manual_seed(0))
    example = {"ids": ids, "labels": ids, "prompt": 0, "label": 1, "reference": ""}
    recipe = Recipe("adamw", 1e-4, batch, 1, 1, 3, "constant", 0.0, 1.0, 0.0, 0.0, "reset",
                    changes.get("checkpointing", False), 1)  # fmt: skip
    task = plugins.build(plugins.parse("task", "classification" if classes else "causal_lm"), "task")
    made = plugins.build(plugins.parse("adapter", adapter), "adapter")
    return Shape(made, task, recipe, changes.get("dtype", "float32"), classes, [example] * batch)


def one(place: int) -> None:
    """Plan and measure one shape in this process; print both in bytes."""
    import torch
    import transformers

    from weft.plan.memory import memory
    from weft.plan.skeleton import skeleton
    from weft.site.cohort import Cohort, Mode
    from weft.site.model import equip

    torch.set_num_threads(1)
    _, values, adapter, batch, tokens, changes = SHAPES[place]
    config = transformers.AutoConfig.for_model(**values)
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    classes = 20 if values["model_type"] == "bert" else 0
    given = shape(adapter, batch, tokens, changes, classes)
    planned = memory(config, given)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    net = skeleton(config, given.task, classes, given.dtype)
    loaded = equip(net, None, given.adapter, given.task, 0, checkpointing=given.recipe.checkpointing)
    loaded.tokenizer = type("Words", (), {"pad_token_id": 0})()
    packs = given.task.pack and values["model_type"] == "llama" and adapter != SHAPES[5][2]
    mode: Mode = "packed" if packs else "single"
    engine = Cohort(loaded, given.task, given.recipe, 0, mode, loaded.lift)
    start = {name: p.detach()[None].clone() for name, p in loaded.initial.items()}
    engine.train(1, {"client": given.examples}, start, {}, None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps({"planned": planned.total, "measured": peak, "libraries": before}))


def planning(name: str) -> dict[str, Any]:
    """Plan a large model with the command, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.yaml"
        targets = "[query_key_value]" if name in ("bloom-7b1", "chatglm-6b") else "[q_proj, v_proj]"
        job.write_text(
            f"model: {{name: {ROOT / 'tests/plan/configs' / name}}}\n"
            f"adapter: {{lora: {{rank: 8, targets: {targets}}}}}\n"
            "task: {causal_lm: {max_length: 512}}\n"
            "data: {train: none, split: {iid: {clients: 4}}}\n"
            "local: {batch: 1}\n",
            encoding="utf8",
        )
        child = subprocess.Popen([sys.executable, "-m", "weft", "plan", str(job)], stdout=subprocess.PIPE, text=True)
        assert child.stdout
        first = child.stdout.readline()
        counted = own_seconds(child.pid)
        child.stdout.read()
        _, _, used = os.wait4(child.pid, 0)
    (trained, *_) = re.findall(r": ([\d,]+) of", first)
    cpu = used.ru_utime + used.ru_stime
    return {"name": name, "trained": trained, "counted": counted, "cpu": cpu, "mb": used.ru_maxrss / 1024}


def own_seconds(process: int) -> float:
    """Return the CPU seconds that a process has used until now."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def imported() -> float:
    """Return the CPU seconds of importing the libraries alone."""
    text = "import torch, peft; from transformers import LlamaForCausalLM"
    child = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)
    _, _, used = os.wait4(child.pid, 0)
    return used.ru_utime + used.ru_stime


def main() -> int:
    if sys.argv[1:] == ["--counts"]:
        print(f"imports alone: {imported():.1f} CPU seconds")
        for name in PLANNED:
            print(planning(name), flush=True)
        return 0
    if len(sys.argv) == 2:
        one(int(sys.argv[1]))
        return 0
    from weft.site.allocator import tuned

    planned, measured = [], []
    alone = imported()
    for name in PLANNED:
        planned.append(planning(name))
        print(planned[-1], flush=True)
    for place, (name, *_) in enumerate(SHAPES):
        command = [sys.executable, __file__, str(place)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, env=tuned(os.environ))
        found = json.loads(printed.stdout.strip().splitlines()[-1])
        measured.append((name, found))
        print(name, found, f"{found['planned'] / found['measured'] - 1:+.1%}", flush=True)
    lines = ["# Planning", "", f"Machine: {platform.machine()}, Python {platform.python_version()}, one thread; other "
             f"work beside it. Importing torch, transformers and peft alone took {alone:.1f} CPU seconds then.", "",
             "| config | LoRA of rank 8: trained | CPU seconds until that is printed | and until all is | peak MB |",
             "|---|---:|---:|---:|---:|"]  # fmt: skip
    lines += [
        f"| {p['name']} | {p['trained']} | {p['counted']:.1f} | {p['cpu']:.1f} | {p['mb']:.0f} |" for p in planned
    ]
    lines += ["", "Memory of one client's step, libraries apart (wanted: within 20 %):", "",
              "| shape | planned MiB | measured MiB | error |", "|---|---:|---:|---:|"]  # fmt: skip
    worst = 0.0
    for name, found in measured:
        error = found["planned"] / found["measured"] - 1
        worst = max(worst, abs(error))
        lines.append(f"| {name} | {found['planned'] / MIB:.0f} | {found['measured'] / MIB:.0f} | {error:+.1%} |")
    (ROOT / "benchmarks/results/plan.md").write_text("\n".join(lines) + "\n", encoding="utf8")
    print(f"worst {worst:.1%}")
    return int(worst > 0.2)


if __name__ == "__main__":
    sys.exit(main())
