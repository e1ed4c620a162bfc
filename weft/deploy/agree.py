"""Before round 1: every site has accepted the job, and has the same base, tokenizer, labels and first adapter."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from weft import __version__
from weft.core.errors import PolicyError
from weft.fingerprints import versions
from weft.links import wire

SAME = {
    "fingerprint": "the base model or its vocabulary",
    "tokenizer": "how the tokenizer divides a text",
    "adapter": "the first adapter, which the seed and the base decide",
    "classes": "the labels of its records",
    "weft": "the version of Weft",
}
"""What all sites must have alike -> how it is called."""
NOTICED = ("torch", "transformers", "peft")


def facts(described: Mapping[str, Any], classes: tuple[str, ...]) -> dict[str, Any]:
    """Return what a site says of itself beside its description."""
    adapter = hashlib.sha256(wire.pack({"adapter": described["adapter"]})).hexdigest()
    return {"classes": list(classes), "first": adapter, "weft": __version__, "versions": versions()}


def check(described: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Refuse sites that differ, naming who and in what; return notices for versions that may differ.

    described: site -> its description, with the facts beside. Raise PolicyError.
    """
    for key, told in SAME.items():
        values = {site: _value(key, row) for site, row in described.items()}
        odd = _odd(values)
        if odd:
            raise PolicyError(f"{' and '.join(odd)}: {told} {_is_other(key, odd, described)}")
    found = []
    for name in NOTICED:
        held = {site: str(row["versions"].get(name)) for site, row in described.items()}
        if len(set(held.values())) > 1:
            listed = ", ".join(f"{site} {value}" for site, value in sorted(held.items()))
            found.append(f"{name} is not the same everywhere ({listed}): last digits of numbers may differ")
    return found


def _value(key: str, row: Mapping[str, Any]) -> str:
    return str(row["first"] if key == "adapter" else row.get(key))


def _odd(values: Mapping[str, str]) -> list[str]:
    """Return the sites that differ from most, in name order."""
    most = Counter(sorted(values.values())).most_common(1)[0][0]
    return sorted(site for site, value in values.items() if value != most)


def _is_other(key: str, odd: list[str], described: Mapping[str, Mapping[str, Any]]) -> str:
    """Say in what a site differs from the others."""
    one, other = described[odd[0]], next(row for site, row in described.items() if site not in odd)
    if key == "classes":
        mine, theirs = set(one["classes"]), set(other["classes"])
        parts = [f"more: {', '.join(sorted(mine - theirs))}"] if mine - theirs else []
        parts += [f"missing: {', '.join(sorted(theirs - mine))}"] if theirs - mine else []
        return f"are not those of the others ({'; '.join(parts) or 'in another order'}); all sites need the same set"
    short = f"{_value(key, one)[:12]}, the others have {_value(key, other)[:12]}"
    return f"is not that of the others ({short}); give every site the same, then start again"
