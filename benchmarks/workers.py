"""One process with all threads against one worker process a core: seconds a round, processor time, memory in all.

    python benchmarks/workers.py [--clients 8 16] [--rounds 4] [--repeats 2]

A LLaMA shape of 25 M parameters with random weights, LoRA r=8 on q and v, batches of 4 x 128 tokens, 2 steps a client
and round, blocks by the token budget. Each run is a `weft run` of its own, the variants in turn; memory is the largest
proportional set size (PSS) of all its processes together, looked at four times a second. Writes
benchmarks/results/workers.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8192,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": True,
}  # fmt: skip


def variants(cores: int) -> dict[str, list[str]]:
    return {
        "one process, one thread": ["--threads", "1"],
        f"one process, {cores} threads": ["--threads", str(cores)],
        f"{cores} workers, one thread each": ["--threads", "1", "--devices", f"cpu*{cores}"],
    }


def job(clients: int, rounds: int) -> dict[str, Any]:
    return {
        "model": {"name": "model", "random": True},
        "adapter": {"lora": {"rank": 8, "targets": ["q_proj", "v_proj"]}},
        "task": {"causal_lm": {"max_length": 128}},
        "data": {"train": "train.jsonl", "test": "test.jsonl", "split": {"iid": {"clients": clients}}},
        "local": {"lr": 1e-3, "batch": 4, "steps": 2},
        "rounds": rounds,
        "evaluate": {"every": 0, "on": ["loss"]},
        "baselines": [],
    }


def shape(folder: Path) -> None:
    """Write a model folder without weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((ROOT / "examples/models/stories260K" / name).read_bytes())


def prepare(folder: Path, clients: list[int], rounds: int) -> None:
    """Write the shape and records that are longer than 128 tokens, so that every client has the same work."""
    shape(folder / "model")
    for name, count in (("train", 8 * max(clients)), ("test", 4)):
        lines = ({"question": f"What is {i}?", "answer": f"It is number {i}. " * 60} for i in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number in clients:
        (folder / f"job-{number}.yaml").write_text(yaml.safe_dump(job(number, rounds)))


def tree(process: psutil.Process) -> Iterator[psutil.Process]:
    yield process
    yield from process.children(recursive=True)


def looked_at(process: psutil.Process) -> tuple[float, float, int]:
    """Return the proportional memory of a process and all below it in MB, their processor seconds, and their number."""
    memory = seconds = 0.0
    count = 0
    for one in tree(process):
        try:
            memory += one.memory_full_info().pss / 1e6
            times = one.cpu_times()
        except psutil.Error:
            continue
        seconds, count = seconds + times.user + times.system, count + 1
    return memory, seconds, count


def measured(folder: Path, clients: int, options: list[str]) -> dict[str, float]:
    """Run a job once and return its row."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = [sys.executable, "-m", "weft.cli", "run", str(folder / f"job-{clients}.yaml"), "--out", str(out)]
    began = time.time()
    run = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    process, peak, seconds, most = psutil.Process(run.pid), 0.0, 0.0, 0
    while run.poll() is None:
        try:
            memory, spent, count = looked_at(process)
        except psutil.Error:
            break
        peak, seconds, most = max(peak, memory), max(seconds, spent), max(most, count)
        time.sleep(0.25)
    _, said = run.communicate()
    if run.returncode:
        raise SystemExit(said.decode())
    rows = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    rounds = [row["seconds"]["round"] for row in rows if row["round"]]
    return {
        "round": statistics.median(rounds[1:]),
        "start": time.time() - began - sum(rounds),
        "all": time.time() - began,
        "cpu": seconds,
        "memory": peak,
        "processes": most,
        "adapter": hash((out / "adapter" / "adapter_model.safetensors").read_bytes()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    rows: dict[tuple[int, str], list[dict[str, float]]] = {}
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place), options.clients, options.rounds)
        for _ in range(options.repeats):
            for clients in options.clients:
                for name, settings in variants(cores).items():
                    rows.setdefault((clients, name), []).append(measured(Path(place), clients, settings))
                    print(clients, name, rows[clients, name][-1], flush=True)
                    loads.append(os.getloadavg()[0])
    write(rows, f"python benchmarks/workers.py --rounds {options.rounds} --repeats {options.repeats}", loads, cores)


def write(rows: dict[tuple[int, str], list[dict[str, float]]], command: str, loads: list[float], cores: int) -> None:
    lines = [
        "# A worker for each core",
        "",
        "A LLaMA shape of 25 M parameters, LoRA r=8 on q and v, batches of 4 x 128 tokens, 2 steps a client and round; "
        "medians. Outside the rounds: starting, loading, two evaluations of 4 records, the report. Memory: PSS of all "
        "processes together at its highest.",
        "",
        "| clients | variant | s a round | s outside the rounds | CPU s in all | MB | processes |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for (clients, name), found in rows.items():
        value = {key: statistics.median(row[key] for row in found) for key in found[0]}
        lines.append(
            f"| {clients} | {name} | {value['round']:.2f} | {value['start']:.1f} | {value['cpu']:.0f} | "
            f"{value['memory']:.0f} | {value['processes']:.0f} |"
        )
    one_thread = {
        clients: {row["adapter"] for (number, name), found in rows.items() for row in found
                  if number == clients and f"{cores} threads" not in name}
        for clients in {number for number, _ in rows}
    }  # fmt: skip
    same = all(len(found) == 1 for found in one_thread.values())
    lines += [
        "",
        f"Adapters of one process with one thread and of the workers are {'the same bytes' if same else 'NOT alike'}.",
        "",
        f"Machine: {platform.machine()}, {cores} cores; load {min(loads):.1f} to {max(loads):.1f}, these runs' own "
        f"2 included. Command: `{command}`.",
    ]
    (RESULTS / "workers.md").write_text("\n".join(lines) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
