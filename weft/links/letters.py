"""Orders, replies, questions and answers as trees that `wire` can seal, and back, checked field by field.

Every letter names its job by the job's hash, so that one of another job is refused on either side.
"""

import base64
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from weft.core.errors import RunError, WeftError
from weft.core.types import Order, Question, Reply, Site
from weft.links import wire

if TYPE_CHECKING:
    from weft.secure.coordinator import Coordinator

Tree = dict[str, Any]
OWN = ("clients", "since", "secure")
"""The fields of an order that each site has for itself; all others it shares with every other site."""
_LONGEST = 1000  # characters of a failure


def order_letters(
    job: str,
    order: Order,
    clients: Mapping[str, tuple[str, ...]],
    more: Mapping[str, Tree] | None = None,
    **beside: Any,
) -> tuple[dict[str, bytes], bytes]:
    """Seal an order for each site with its own clients: return their beginnings and the body that all share.

    more: site -> fields of its letter alone; beside: fields of all.
    """
    shared, own = shared_order(job, order, **beside), more or {}
    return {
        site: order_front(shared, order, names, **own.get(site, {})) for site, names in clients.items()
    }, shared.body


def shared_order(job: str, order: Order, **beside: Any) -> wire.Shared:
    """Seal what of an order is the same for all sites."""
    common = {f.name: getattr(order, f.name) for f in fields(order) if f.name not in OWN}
    if order.length is None:  # no word of it where clip does not adapt
        del common["length"]
    lists = {"metrics": list(order.metrics), "cohort": list(order.cohort)}
    return wire.share({"is": "order", "job": job, **common, **beside, **lists})


def order_front(shared: wire.Shared, order: Order, clients: Collection[str], **more: Any) -> bytes:
    """Return the beginning of the order for some clients; what their masks need stands there as base64."""
    needed = {name: base64.b64encode(order.secure[name]).decode() for name in clients if name in order.secure}
    since = {name: order.since[name] for name in clients if name in order.since}
    return shared.front({"clients": list(clients), "since": since, "secure": needed, **more})


def letter(what: str, job: str, /, **tree: Any) -> bytes:
    """Seal any other letter."""
    return wire.seal({"is": what, "job": job, **tree})


def counted(coordinator: "Coordinator") -> "Coordinator":
    """Let secure aggregation count each message as the letter that carries it, between sites and in one process."""
    job = coordinator.job

    def weigh(what: str, kind: str, client: str, message: bytes) -> int:
        own = {client: message}
        asks = what == "question"
        return len(letter(what, job, kind=f"secure.{kind}", body={"to": own}) if asks else letter(what, job, body=own))

    return replace(coordinator, weigh=weigh)


def opened(content: bytes, kinds: Collection[str], job: str) -> Tree:
    """Unseal a letter; raise RunError for one that is damaged, of another kind or of another job."""
    tree = wire.unseal(content)
    if not isinstance(tree, dict) or tree.get("is") not in kinds:
        raise RunError(f"a message is none of {', '.join(sorted(kinds))}")
    if job and tree.get("job") != job:
        raise RunError(f"a message belongs to the job {str(tree.get('job'))[:12]}, not to {job[:12]}")
    return tree


def order_of(tree: Tree) -> Order:
    """Return the order of a letter; raise RunError where a field has another type."""
    state = field_of(tree, "state", dict)
    if tree.get("kind") not in ("train", "evaluate", "untrained") or not _is_state(state):
        raise RunError("an order is damaged: its kind or its state is none")
    since = field_of(tree, "since", dict)
    if not all(_is_count(value) for value in since.values()):
        raise RunError("an order is damaged: `since` counts rounds")
    clients, metrics, cohort = (tuple(map(str, field_of(tree, key, list))) for key in ("clients", "metrics", "cohort"))
    length = field_of(tree, "length", float) if "length" in tree else None
    return Order(tree["kind"], _count(tree, "round"), clients, state, since, metrics, cohort, _secure(tree), length)


def _secure(tree: Tree) -> dict[str, bytes]:
    try:
        return {name: base64.b64decode(text, validate=True) for name, text in field_of(tree, "secure", dict).items()}
    except (TypeError, ValueError):
        raise RunError("an order is damaged: `secure` holds no base64") from None


def question_of(tree: Tree) -> Question:
    """Return the question of a letter."""
    return Question(str(field_of(tree, "kind", str)), field_of(tree, "body", dict))


def replies_letter(job: str, replies: Iterable[Reply]) -> bytes:
    """Seal what a site replies to an order."""
    return letter("replies", job, replies=[reply_tree(reply) for reply in replies])


def reply_tree(reply: Reply) -> Tree:
    """Return a reply as a tree; the bytes that it takes are counted by whoever carries it."""
    tree = {f.name: getattr(reply, f.name) for f in fields(reply) if not f.name.startswith("bytes_")}
    return tree | {"measured": {group: dict(sums) for group, sums in reply.measured.items()}}


def replies_of(content: bytes, order: Order, clients: Collection[str], job: str) -> list[Reply]:
    """Return the replies of a site's letter; where it is damaged or says no, a failure for each of its clients."""
    try:
        tree = opened(content, ("replies", "failure"), job)
        if tree["is"] == "failure":
            raise RunError(str(tree.get("reason"))[:_LONGEST])
        return [reply_of(reply, order, clients) for reply in field_of(tree, "replies", list)]
    except RunError as error:
        return [Reply(name, order.round, failure=str(error)) for name in clients]


def reply_of(tree: Any, order: Order, clients: Collection[str]) -> Reply:
    """Return a reply; raise RunError for one that is not of these clients, not to this order, or damaged."""
    if not isinstance(tree, dict) or tree.get("client") not in clients or tree.get("round") != order.round:
        raise RunError("a reply is for another client or another round")
    update, failure = field_of(tree, "update", dict), tree.get("failure")
    metrics, measured = field_of(tree, "metrics", dict), field_of(tree, "measured", dict)
    if failure is not None and not isinstance(failure, str):
        raise RunError("a reply is damaged: its failure is no text")
    if not _is_state(update) or not _are_sums(metrics) or not all(map(_are_sums, measured.values())):
        raise RunError("a reply is damaged: its update holds no tensors, or its metrics no numbers")
    return Reply(
        tree["client"],
        order.round,
        update,
        _count(tree, "weight"),
        _count(tree, "examples"),
        metrics,
        measured,
        " ".join(failure.split())[:_LONGEST] if failure else None,
        tree.get("not_finite") is True,
    )


def field_of(tree: Tree, key: str, kind: type) -> Any:
    """Return a field; raise RunError where it is missing or of another type."""
    if not isinstance(tree.get(key), kind):
        raise RunError(f"a message is damaged: `{key}` is missing or no {kind.__name__}")
    return tree[key]


def _count(tree: Tree, key: str) -> int:
    value = tree.get(key)
    if not _is_count(value):
        raise RunError(f"a message is damaged: `{key}` is missing or no count")
    return int(value)  # type: ignore[arg-type]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_state(state: Any) -> bool:
    trees = state.values() if isinstance(state, dict) else [None]
    return all(isinstance(t, dict) and all(isinstance(v, Tensor) for v in t.values()) for t in trees)


def _are_sums(values: Any) -> bool:
    return isinstance(values, dict) and all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in values.values()
    )


def answer(site: Site, content: bytes, job: str) -> bytes:
    """Let a site handle a letter; return its own: replies, an answer, or a failure in one sentence."""
    try:
        tree = opened(content, ("order", "question"), job)
        if tree["is"] == "question":
            return letter("answer", job, body=site.answer(question_of(tree)))
        return replies_letter(job, site.handle(order_of(tree)))
    except WeftError as error:
        return letter("failure", job, reason=str(error))
