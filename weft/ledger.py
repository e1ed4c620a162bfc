"""The ledger: what all messages of a run weighed, read from its journal, and whether another round fits the budget."""

from pathlib import Path

from weft import journal
from weft.core import coding
from weft.core.pipeline import Pipeline
from weft.core.round import Federation
from weft.core.template import template
from weft.core.types import At, Order, Reply, State
from weft.links import letters

NO_JOB = "0" * 64  # as long as the hash of any


def rounds(path: Path) -> list[int]:
    """Return the bytes of each finished round, both ways, lost and repeated messages included."""
    return [row["bytes_up"] + row["bytes_down"] for row in journal.read(path) if row["round"]]


def spent(path: Path, megabytes: float | None) -> str | None:
    """Say why no other round is begun; None where it fits the budget, were it as large as the largest yet."""
    if megabytes is None:
        return None
    found = rounds(path)
    if not found or sum(found) + max(found) <= megabytes * 1e6:
        return None
    return (
        f"budget.megabytes: {sum(found) / 1e6:.3f} of {megabytes:g} MB are spent after round {len(found)}, and another "
        f"round takes {max(found) / 1e6:.3f}; the run ends here"
    )


def forecast(federation: Federation) -> tuple[int, int]:
    """Return the bytes up and down of one client in the first round, but for a few of metadata; before `zstd` packs."""
    algorithm, first = federation.algorithm, federation.initial
    state = coding.form_down(algorithm, first)
    update = template(algorithm, state, first, 1, federation.clients)
    at = At(federation.seed, 1, "", algorithm.origin(state, first))
    client, cohort = federation.clients[0], federation.clients[: federation.per_round]
    sent = _coded(federation.pipeline, at, update)
    got = _coded(federation.downlink, coding.at_down(federation.seed, 1), state)
    told = {} if federation.wire.hidden else dict.fromkeys(("steps", "loss", "last_loss", "seconds"), 0.0)
    up = letters.replies_letter(NO_JOB, [Reply(client, 1, sent, 100, 100, told)])
    order = Order("train", 1, (client,), got, {client: 0}, cohort=cohort)
    fronts, body = letters.order_letters(NO_JOB, order, {client: (client,)})
    return len(up), len(fronts[client]) + len(body)


def _coded(steps: Pipeline, at: At, given: State) -> State:
    """Return what stands behind the steps whose length is known beforehand."""
    return coding.forms([step for step in steps if not step[1].varies], at, given)[-1]
