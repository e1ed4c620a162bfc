"""What a run is made of, as hashes: base, tokenizer, data, versions; compared wherever a run goes on."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from weft.core.errors import PolicyError

PROBE = "Two naïve patients (37 °C) asked:\n\t“Is 0.5 mg enough?” 中文 🙂 <s></s>"
"""Text whose tokens differ where tokenizers do: spaces, digits, quotes, scripts, special tokens."""
SITE = ("fingerprint", "tokenizer")
"""What a site says of itself."""
NAMES = {
    "fingerprint": "the base model or its vocabulary",
    "tokenizer": "how the tokenizer divides a text",
    "train": "the training data",
    "test": "the test data",
}


class _Hashed(Protocol):
    @property
    def sha256(self) -> str: ...


def tokenizer_print(tokenizer: Any) -> str:
    """Return a SHA-256 over how a tokenizer encodes a probe, with its special tokens and its chat template."""
    facts = [
        tokenizer(PROBE)["input_ids"],
        dict(tokenizer.special_tokens_map),
        getattr(tokenizer, "chat_template", None),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def of_data(train: _Hashed, test: _Hashed) -> dict[str, str]:
    """Return the hashes of the records, as they were read."""
    return {"train": train.sha256, "test": test.sha256}


def versions() -> dict[str, str]:
    """Return the versions of the libraries that numbers depend on."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "numpy")}


def compare(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> list[str]:
    """Refuse to go on with other things than a run began with; return a notice for each library that has changed."""
    changed = [said for name, said in NAMES.items() if old.get(name) != new.get(name)]
    if changed:
        raise PolicyError(
            f"{folder}: {' and '.join(changed)} changed since this run began; put it back, or choose another --out"
        )
    before, now = old.get("versions", {}), new["versions"]
    return [
        f"{name} is {now[name]} and was {before.get(name)} when this run began: last digits of its numbers may differ"
        for name in now
        if now[name] != before.get(name)
    ]
