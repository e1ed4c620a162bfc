"""Mutated inputs for every parser: whatever comes, only Weft's own errors may come out."""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save

from weft.adapters.gate import checked
from weft.core.errors import WeftError
from weft.core.types import Order, Reply, Server
from weft.data.records import read
from weft.job import load
from weft.links import letters, wire
from weft.store import Store

Parser = Callable[[bytes, Path], object]

JOB = b"""model: {name: model}
adapter: {lora: {rank: 2, alpha: 4.0, targets: [q_proj, v_proj]}}
task: {causal_lm: {template: plain, max_length: 48}}
data:
  train: train.jsonl
  test: test.jsonl
  split: {dirichlet: {alpha: 0.5, clients: 8, by: label}}
local: {lr: 1e-3, batch: 2, epochs: 1}
pipeline: [weigh: {by: examples, cap: 100}]
failures: {on_client_failure: retry, quorum: 0.5}
rounds: 1
seed: 7
"""
RECORDS = b"".join(
    json.dumps({"question": f"Why {i}?", "answer": "So.", "n": i / 3}).encode() + b"\n" for i in range(6)
)
TENSORS = {"a": torch.ones(2, 3), "b/c": torch.arange(4.0)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"a.b": 3}}
ORDER = Order("train", 1, ("a", "b"), {"adapter": TENSORS}, {"a": 1}, ("loss",), ("a", "b"), {"a": b"seed"})
REPLY = Reply("a", 1, {"adapter": TENSORS}, 3, 3, {"loss": 1.5}, {"all": {"nll": 2.0}})
PIECES = (
    *(
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b":",
        b"\n",
        b"\r",
        b"\t",
        b"- ",
        b"&a ",
        b"*a",
    ),
    *(
        b"<<: ",
        b"!!python/object:os.system ",
        b"nan",
        b"-inf",
        b"1e999",
        b"yes",
        b"0x1f",
        b"null",
        b"~",
        b"9" * 400,
        b"\\u0000",
    ),
    *(
        b"\xed\xa0\x80",
        b"[" * 3000,
        b'{"a":' * 1500,
        b"*" * 50,
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2**40),
        b"F64",
        b"BF16",
    ),
)


def mutated(content: bytes, draw: Random) -> bytes:
    """Return bytes with one to four changes: flips, cuts, repeats, insertions, or nothing of the original."""
    if draw.random() < 0.03:
        return draw.randbytes(draw.randrange(200))
    for _ in range(draw.randrange(1, 5)):
        start = draw.randrange(len(content) + 1)
        end = min(len(content), start + draw.choice((0, 1, 2, 8, 40)))
        what = draw.randrange(5)
        if what == 0 and content:
            place = draw.randrange(len(content))
            content = content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
        elif what == 1:
            content = content[:start] + content[end:]
        elif what == 2:
            content = content[:end] + content[start:end] * draw.randrange(1, 4) + content[end:]
        elif what == 3:
            content = content[:start] + draw.choice(PIECES) + content[end:]
        else:
            content = content[:start]
    return content


def read_records(content: bytes, folder: Path) -> object:
    """Read the bytes as JSONL."""
    (folder / "data.jsonl").write_bytes(content)
    return read("data.jsonl", folder=folder, needs=(("question", "answer"),))


def read_job(content: bytes, folder: Path) -> object:
    """Read the bytes as a job."""
    (folder / "job.yaml").write_bytes(content)
    return load(folder / "job.yaml")


def read_config(content: bytes, folder: Path) -> object:
    """Read the bytes as the config of an adapter."""
    (folder / "adapter_model.safetensors").write_bytes(save(TENSORS))
    (folder / "adapter_config.json").write_bytes(content)
    return checked(folder)


def read_weights(content: bytes, folder: Path) -> object:
    """Read the bytes as the weights of an adapter."""
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "adapter_model.safetensors").write_bytes(content)
    return checked(folder)


def read_message(content: bytes, folder: Path) -> object:
    """Read the bytes as a state from the wire."""
    return wire.unpack(content)


def read_order(content: bytes, folder: Path) -> object:
    """Read the bytes as an order that came to a site."""
    return letters.order_of(letters.opened(content, ("order",), ""))


def read_reply(content: bytes, folder: Path) -> object:
    """Read the bytes as a reply that came to the coordinator."""
    return letters.reply_of(letters.opened(content, ("reply",), ""), ORDER, ORDER.clients)


def read_checkpoint(content: bytes, folder: Path) -> object:
    """Read the bytes as the newest checkpoint of a run."""
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "000001.safetensors").write_bytes(content)
    return Store(folder, "job").latest()


@dataclass(frozen=True)
class Target:
    """A parser, with a sound input that it takes."""

    parse: Parser
    sound: bytes


def targets(folder: Path) -> Mapping[str, Target]:
    """Return every parser that reads what others wrote; folder: an empty one."""
    Store(folder, "job").commit(Server({"adapter": TENSORS}, 1, {"x": 1}), {"round": 1})
    fronts, body = letters.order_letters("job", ORDER, {"here": ORDER.clients})
    checkpoint = (folder / "checkpoints" / "000001.safetensors").read_bytes()
    return {
        "records": Target(read_records, RECORDS),
        "job": Target(read_job, JOB),
        "adapter config": Target(read_config, json.dumps(CONFIG, indent=1).encode()),
        "adapter weights": Target(read_weights, save(TENSORS)),
        "wire": Target(read_message, wire.pack({"adapter": TENSORS})),
        "letter with an order": Target(read_order, fronts["here"] + body),
        "letter with a reply": Target(read_reply, letters.letter("reply", "job", **letters.reply_tree(REPLY))),
        "checkpoint": Target(read_checkpoint, checkpoint),
    }


def tried(target: Target, content: bytes, folder: Path) -> str:
    """Return `taken` or `refused`, or the name of an exception that is not Weft's own, with its words."""
    try:
        target.parse(content, folder)
    except WeftError as error:
        said = str(error)
        return "refused" if said and "\n" not in said and "Traceback" not in said else f"a bad sentence: {said[:200]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "taken"
