"""The length of a clip that adapts: the server's from round to round, in its checkpoint and in every order.

A round runs with the pipeline at the length in use, so that both halves of clip go by it, and noise too. Each client
tells one bit beside its update: whether it was short enough already. Only their sum is used, and no bit is kept.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from weft.core.errors import RunError
from weft.core.pipeline import Pipeline
from weft.core.types import Link, Reply, Server, Tally, Wire

if TYPE_CHECKING:
    from weft.core.round import Federation

KEPT = "clip"  # the part of what a server keeps beside its state
SHORT = "short"  # a client's bit, among what it tells of its training
Record = dict[str, Any]
Run = Callable[[Server, "Federation", Link], tuple[Server, Record]]


def at_length(steps: Pipeline, length: float | None) -> Pipeline:
    """Return the steps at the length that an order names; raise RunError where the two do not fit."""
    if any(step.adapts for _, step in steps) != (length is not None):
        raise RunError("the server and this client do not agree whether clip adapts; give both the same job")
    if length is None:
        return steps
    if not 0 < length < math.inf:
        raise RunError(f"an order is damaged: clip cannot shorten to a length of {length}")
    return [(name, step.adapts.at(length) if step.adapts else step) for name, step in steps]


def untold(wire: Wire, reply: Reply) -> tuple[str, bool] | None:
    """Say why a reply cannot be counted, as `refusal` does, where it lacks its bit."""
    if wire.length is None or reply.metrics.get(SHORT) in (0.0, 1.0):
        return None
    return "it does not say whether its update was short enough for clip", False


def adapted(run: Run, server: Server, federation: "Federation", link: Link) -> tuple[Server, Record]:
    """Run a round at the length in use, and choose the next one; a round of any other pipeline as it is."""
    if (first := federation.wire.length) is None:
        return run(server, federation, link)
    length = float(server.beside[KEPT]["norm"]) if KEPT in server.beside else first
    federation = replace(federation, pipeline=at_length(federation.pipeline, length))
    after, record = run(server, federation, link)
    share, following = _next(federation, record, length)
    beside = {**after.beside, KEPT: {"norm": torch.tensor([following], dtype=torch.float64)}}
    told = {"clip_norm": float(f"{length:.6g}"), "clip_share": None if share is None else float(f"{share:.6g}")}
    return replace(after, beside=beside), {**record, **told}


def _next(federation: "Federation", record: Record, length: float) -> tuple[float | None, float]:
    """Return the noisy share of the updates that were short enough, and the next length; take the bits away."""
    clients = record["clients"]
    short = sum(int(row.pop(SHORT)) for row in clients.values())
    if not clients:
        return None, length
    weights, examples = ({name: row[key] for name, row in clients.items()} for key in ("weight", "examples"))
    tally = Tally(record["round"], weights, examples, secret=federation.secret, wire=federation.wire)
    (adapts,) = (step.adapts for _, step in federation.pipeline if step.adapts)
    return adapts.after(short, tally)
