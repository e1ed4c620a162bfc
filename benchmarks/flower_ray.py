"""The same federated work in Weft and in Flower's Ray simulation: wall time, processor time, memory, time to start.

    python3.11 -m venv /somewhere/flower
    /somewhere/flower/bin/pip install -c constraints-of-your-own "flwr[simulation]==1.41.0" torch transformers peft
    python benchmarks/flower_ray.py --flower /somewhere/flower/bin/python [--cases a b c] [--rounds 3] [--repeats 1]

Flower wants an environment of its own, for it pins ray; give it the torch, transformers and peft of constraints.txt.
The work: a LLaMA of 25 M parameters with random weights in a folder, LoRA r=8 on q and v, 8 clients, AdamW with a clip;
(a) 8 steps of 4 examples of 128 tokens, (b) 8 steps of one example of 32 tokens, (c) 8 steps of 2 questions with
answers of examples/data/medquad, or of `--data`. Both sides start from the same adapter and take the same tokenised
examples in the same order; the adapters at the end must agree.

Flower's app is written well: a worker process a core, one thread each, the base and the examples loaded once a worker,
adapters as one ArrayRecord, evaluation and strategies left out. `usual` loads the base for each message, as most
examples do. Weft runs the job through `weft.run` in a process that begins as the command `weft` does, with two
threads (two blocks side by side) or with a worker process a core (`--devices cpu*2`, and a smaller `--block` where
there are few clients).

Memory is the largest sum over a run's processes, of proportional set sizes (PSS), where what several share counts once,
and of resident set sizes (RSS); it and the processor time are looked at four times a second. Writes
benchmarks/results/flower_ray.md.
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
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE / "results/flower_ray.md"
CLIENTS, STEPS, CORES = 8, 8, 2
CASES = {"a": (4, 128), "b": (1, 32), "c": (2, 512)}
"""Examples of a step; the most tokens of one. (c) has questions and answers."""
WORKERS_BLOCK = {"b": CLIENTS // CORES}
"""Case -> clients of a block, where all of them fit one by the token budget, and other workers would wait."""
LR, CLIP = 1e-3, 1.0
LONGEST, MANY = 2000, 4000  # characters of a question with its answer, so that they fit 512 tokens; pairs that are read


# Both sides


def told(round_: int) -> None:
    """Say that a round has ended."""
    print(json.dumps({"round": round_, "time": time.time()}), flush=True)


# Weft


def tokenizer_folder(folder: Path, texts: list[str]) -> None:
    """Write a byte-pair tokenizer of 8,192 words learned from the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=8192, special_tokens=special, show_progress=False))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def model_folder(folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=8192, max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def job_of(folder: Path, case: str, rounds: int) -> dict[str, Any]:
    batch, most = CASES[case]
    return {
        "model": {"name": str(folder / "model")},
        "adapter": {"lora": {"rank": 8, "targets": ["q_proj", "v_proj"]}},
        "task": {"causal_lm": {"max_length": most}},
        "data": {
            "train": str(folder / f"{case}.jsonl"),
            "test": str(folder / f"test-{case}.jsonl"),
            "split": {"by": "site"},
        },
        "local": {"lr": LR, "batch": batch, "steps": STEPS, "clip": CLIP, "weight_decay": 0.0},
        "rounds": rounds,
        "evaluate": {"every": 0, "on": ["loss"]},
        "baselines": [],
    }


def prepare_folder(folder: Path, cases: list[str], rounds: int, data: Path) -> None:
    """Write model, records, and for Flower the first adapter with the tokenised examples of each client and step."""
    import torch
    from engine import pairs_of

    import weft
    from weft.prepare import prepare, set_up
    from weft.site.recipe import batches

    pairs = [pair for pair in pairs_of(data) if sum(map(len, pair)) <= LONGEST]
    rows = [{"question": asked, "answer": answer} for asked, answer in pairs[:MANY]]
    texts = [f"{row['question']} {row['answer']}" for row in rows]
    tokenizer_folder(folder / "model", texts)
    model_folder(folder / "model")
    stream = cycle(" ".join(texts).split())
    for case in cases:
        batch, most = CASES[case]
        count = CLIENTS * STEPS * batch
        records = rows[:count] if case == "c" else [{"text": " ".join(islice(stream, most))} for _ in range(count)]
        sites = [record | {"site": f"s{i % CLIENTS}"} for i, record in enumerate(records)]
        (folder / f"{case}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sites), encoding="utf8")
        values = job_of(folder, case, rounds)
        (folder / f"test-{case}.jsonl").write_text(json.dumps(sites[0]) + "\n", encoding="utf8")
        (folder / f"{case}.json").write_text(json.dumps(values), encoding="utf8")
        bench = set_up(prepare(weft.Job(**values)))
        recipe, seed = bench.prepared.plan.recipe, bench.prepared.job.seed
        examples = {name: [(r["ids"], r["labels"]) for r in found.examples] for name, found in bench.train.items()}
        orders = [
            {name: batches(len(found), recipe, seed, round_, name) for name, found in examples.items()}
            for round_ in range(1, rounds + 1)
        ]
        start = {name: value.detach().clone() for name, value in bench.loaded.initial.items()}
        torch.save({"examples": examples, "orders": orders, "start": start, "batch": batch}, folder / f"{case}.pt")


def weft_main(folder: Path, case: str, engine: str) -> None:
    """Run the job; two threads, or a worker process a core."""
    import weft
    from weft.watch import Watch

    class Told(Watch):
        def round(self, method: str, number: int, row: dict[str, Any]) -> None:
            if number:
                told(number)

    settings: dict[str, Any] = {"threads": CORES}
    if engine == "workers":
        settings = {"threads": 1, "devices": f"cpu*{CORES}", "block": WORKERS_BLOCK.get(case, 0)}
    values = json.loads((folder / f"{case}.json").read_text(encoding="utf8"))
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    weft.run(weft.Job(**values), out, watch=Told(), report=False, **settings)
    print(json.dumps({"adapter": str(out / "adapter" / "adapter_model.safetensors")}), flush=True)


# Flower


@cache
def worker(folder: str, case: str) -> tuple[Any, dict[str, Any]]:
    """Return the model with an adapter on it, and the examples; once a worker process."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model").requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    return model.train(), torch.load(Path(folder) / f"{case}.pt")


def local_steps(model: Any, rows: list[Any], order: list[list[int]], adapter: dict[str, Any]) -> dict[str, Any]:
    """Train one client as a plain loop does, each batch padded to its own longest row."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(adapter[name])
    optimizer = torch.optim.AdamW(params.values(), lr=LR, weight_decay=0.0, fused=True)
    for step in order:
        ids, labels = (pad_sequence([rows[i][k] for i in step], True, (0, -100)[k]) for k in (0, 1))
        mask = pad_sequence([torch.ones_like(rows[i][0]) for i in step], True)
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in params.items()}


def client_app() -> Any:
    """Return the client: state in, state out."""
    from flwr.app import ArrayRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Any) -> Message:
        import flower_ray  # by name: a worker's cache is its module's, and not that of a copy in this message

        told_, arrays = message.content["config"], message.content["arrays"]
        if told_["usual"]:
            flower_ray.worker.cache_clear()
        model, data = flower_ray.worker(told_["folder"], told_["case"])
        name = told_["client"]
        order = data["orders"][told_["round"] - 1][name]
        ended = flower_ray.local_steps(model, data["examples"][name], order, arrays.to_torch_state_dict())
        return Message(RecordDict({"arrays": ArrayRecord(ended)}), reply_to=message)

    return app


def server_app(folder: str, case: str, rounds: int, usual: bool) -> Any:
    """Return the server: a mean over eight clients."""
    import torch
    from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
    from flwr.serverapp import ServerApp
    from safetensors.torch import save_file

    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, context: Any) -> None:
        adapter = torch.load(Path(folder) / f"{case}.pt")["start"]
        while len(nodes := sorted(grid.get_node_ids())) < CLIENTS:
            time.sleep(0.1)
        for round_ in range(1, rounds + 1):
            sent = []
            for k, node in enumerate(nodes):
                config = {"folder": folder, "case": case, "round": round_, "client": f"s{k}", "usual": usual}
                content = RecordDict({"arrays": ArrayRecord(adapter), "config": ConfigRecord(config)})
                sent.append(Message(content, message_type=MessageType.TRAIN, dst_node_id=node))
            states = [reply.content["arrays"].to_torch_state_dict() for reply in grid.send_and_receive(sent)]
            adapter = {name: torch.stack([state[name] for state in states]).mean(0) for name in adapter}
            told(round_)
        out = Path(tempfile.mkdtemp(dir=folder)) / "adapter.safetensors"
        save_file({name: value.contiguous() for name, value in adapter.items()}, out)
        print(json.dumps({"adapter": str(out)}), flush=True)

    return app


def flower_main(folder: str, case: str, rounds: int, usual: bool) -> None:
    from flwr.simulation import run_simulation

    backend: Any = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": CORES, "include_dashboard": False, "logging_level": "error"},
    }
    run_simulation(server_app(folder, case, rounds, usual), client_app(), CLIENTS, backend_config=backend)


# Measuring


@dataclass
class Seen:
    """What a run cost, looked at from outside."""

    began: float
    times: list[tuple[float, float]]
    """(moment, processor seconds until then)."""
    pss: float
    rss: float
    rounds: list[float]
    adapter: str

    def spent(self, moment: float) -> float:
        """Return the processor seconds at a moment."""
        before = [(at, value) for at, value in self.times if at <= moment]
        after = [(at, value) for at, value in self.times if at > moment]
        if not before or not after:
            return (before or after)[-1 if before else 0][1]
        (t0, c0), (t1, c1) = before[-1], after[0]
        return c0 + (c1 - c0) * (moment - t0) / (t1 - t0)

    def row(self) -> dict[str, float]:
        steady = len(self.rounds) - 1
        return {
            "first": self.rounds[0] - self.began,
            "wall": statistics.median(b - a for a, b in zip(self.rounds, self.rounds[1:], strict=False)),
            "cpu": (self.spent(self.rounds[-1]) - self.spent(self.rounds[0])) / steady,
            "start_cpu": self.spent(self.rounds[0]),
            "pss": self.pss,
            "rss": self.rss,
        }


def watched(command: list[str], environment: dict[str, str]) -> Seen:
    """Run a command and look at all its processes."""
    import psutil

    began, pss, rss = time.time(), 0.0, 0.0
    times: list[tuple[float, float]] = []
    seen: dict[int, float] = {}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen(command, stdout=out, stderr=said, env=os.environ | environment)
        root = psutil.Process(run.pid)
        while run.poll() is None:
            shared = whole = 0.0
            for one in [root, *root.children(recursive=True)]:
                try:
                    held = one.memory_full_info()
                    shared, whole = shared + held.pss / 1e6, whole + held.rss / 1e6
                    spent = one.cpu_times()
                    seen[one.pid] = spent.user + spent.system
                except psutil.Error:
                    continue
            pss, rss = max(pss, shared), max(rss, whole)
            times.append((time.time(), sum(seen.values())))
            time.sleep(0.25)
        out.seek(0), said.seek(0)
        lines = [json.loads(line) for line in out if line.startswith("{")]
        if run.returncode or not lines:
            raise SystemExit(said.read()[-3000:])
    rounds = [line["time"] for line in lines if "round" in line]
    return Seen(began, times, pss, rss, rounds, lines[-1]["adapter"])


def apart(folder: Path, case: str, left: str, right: str) -> float:
    """Return how far two adapters are apart, as a part of how far training moved the first; peft's names differ."""
    import torch
    from safetensors.torch import load_file

    start = torch.load(folder / f"{case}.pt")["start"]
    three = (
        {n.replace(".default", ""): t for n, t in part.items()} for part in (load_file(left), load_file(right), start)
    )
    one, other, first = (torch.cat([part[name].flatten() for name in sorted(part)]) for part in three)
    return float((one - other).norm() / (one - first).norm())


def engines(options: argparse.Namespace, folder: Path, case: str) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Return engine -> its command and environment."""
    from weft.site.allocator import tuned

    own = {"GLIBC_TUNABLES": tuned({})["GLIBC_TUNABLES"]}  # as the command `weft` begins
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    theirs = quiet | {"FLWR_HOME": str(folder / "flwr"), "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    ours = [sys.executable, __file__, "--role", "weft", "--folder", str(folder), "--case", case, "--engine"]
    code = (
        "import sys, flower_ray; flower_ray.flower_main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == '1')"
    )
    flower = [options.flower, "-c", code, str(folder), case, str(options.rounds)]
    found = {
        "Weft, two threads": ([*ours, "threads"], own | {"OMP_NUM_THREADS": str(CORES)}),
        "Weft, two workers": ([*ours, "workers"], own | {"OMP_NUM_THREADS": "1"}),
        "Flower, base kept": ([*flower, "0"], theirs),
        "Flower, base for each message": ([*flower, "1"], theirs),
    }
    if not options.workers:
        del found["Weft, two workers"]
    if case not in options.usual:
        del found["Flower, base for each message"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flower", help="the python of Flower's environment")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--usual", nargs="*", default=["b"], help="cases with the row that loads a base each time")
    parser.add_argument(
        "--data", type=Path, default=HERE.parent / "examples/data/medquad/train.jsonl", help="of case c"
    )
    parser.add_argument("--workers", action="store_true", help="with Weft's worker processes as well")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--role", choices=["weft"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--case")
    parser.add_argument("--engine")
    options = parser.parse_args()
    if options.role == "weft":
        weft_main(options.folder, options.case, options.engine)
        return
    lines, load = others(options), [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_folder(folder, options.cases, options.rounds, options.data)
        for case in options.cases:
            found: dict[str, list[Seen]] = {}
            for _ in range(options.repeats):
                for engine, (command, environment) in engines(options, folder, case).items():
                    found.setdefault(engine, []).append(watched(command, environment))
                    print(case, engine, found[engine][-1].row(), flush=True)
                    load.append(os.getloadavg()[0])
            lines += rows_of(folder, case, found)
            options.page.write_text(page(sorted(lines, key=lambda line: line[2]), load, options), encoding="utf8")


def others(options: argparse.Namespace) -> list[str]:
    """Return the rows of a page that is there already, of the cases that are not measured now."""
    old = options.page.read_text(encoding="utf8").splitlines() if options.page.exists() else []
    return [line for line in old if line.startswith("| ") and line[2] in set(CASES) - set(options.cases)]


def rows_of(folder: Path, case: str, found: dict[str, list[Seen]]) -> list[str]:
    ends = next(iter(found.values()))[0].adapter
    lines = []
    for engine, runs in found.items():
        row = {key: statistics.median(run.row()[key] for run in runs) for key in runs[0].row()}
        lines.append(
            f"| {case} | {engine} | {row['wall']:.1f} | {row['cpu']:.1f} | {row['first']:.1f} | {row['start_cpu']:.1f} "
            f"| {row['pss']:.0f} | {row['rss']:.0f} | {apart(folder, case, ends, runs[0].adapter):.0e} |"
        )
        print(lines[-1], flush=True)
    return lines


def page(lines: list[str], load: list[float], options: argparse.Namespace) -> str:
    return (
        "# The same work in Flower's Ray simulation\n\n"
        f"A LLaMA of 25 M parameters, LoRA r=8 on q and v, {CLIENTS} clients, {STEPS} local steps, {options.rounds} "
        f"rounds, medians of {options.repeats}: (a) 4 x 128 tokens a step, (b) 1 x 32, (c) 2 questions with answers of "
        f"{options.data.parent.name}. Machine: {platform.machine()}, {os.cpu_count()} cores, load {min(load):.1f} to "
        f"{max(load):.1f}, these runs' own 2 included. Flower 1.41 with ray 2.55. "
        "Written by `python benchmarks/flower_ray.py`, which says how.\n\n"
        "| case | engine | round, wall s | round, CPU s | first round done after, wall s | its CPU s | PSS MB | RSS MB "
        "| apart from the first row, of the way |\n|---|---|---|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
