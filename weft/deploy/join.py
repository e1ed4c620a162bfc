"""A site: show the job, refuse what the policy does not allow, train when asked; nothing that is received is run."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from weft import prepare
from weft.core import pipeline, trees
from weft.core.errors import JobError, PolicyError, RunError, WeftError
from weft.core.points import point
from weft.core.types import Order, Question
from weft.deploy import agree
from weft.deploy import policy as policies
from weft.deploy.own import Own
from weft.deploy.summary import Summary, summary
from weft.deploy.told import Told, cost_of
from weft.files import make_folder, write_safely
from weft.job import Job
from weft.links import letters
from weft.links.flower.node import Node
from weft.secure import member as secure
from weft.site.site import Site
from weft.sites import at_site, pinned
from weft.store import locked
from weft.threads import TINY, exactly

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_SHORTEST = 12  # characters of a hash that say which job is meant

Confirm = Callable[[Summary], bool]


@dataclass
class Member:
    """A site in a run: answers one letter after the other."""

    own: Own
    confirm: Confirm
    say: Callable[[str], None]
    job: Job | None = None
    exact: bool = False
    ended: WeftError | None = None
    """Why this site leaves, if it is not because the run is finished."""
    _site: Site | None = None
    _records: dict[str, int] = field(default_factory=dict)
    _classes: tuple[str, ...] = ()
    _read: str = ""
    """The hash of the training records' file."""
    _last: tuple[str, bytes] = ("", b"")
    """The last order, as a hash, and its reply, for one that comes again."""

    def answer(self, content: bytes) -> tuple[bytes, bool]:
        """Return the reply to a letter, and whether it was the last."""
        named = ""
        try:
            tree = letters.opened(content, ("job", "question", "order", "end"), "")
            named = str(tree.get("job"))
            if tree["is"] == "job":
                return self._meet(tree), False
            if tree["is"] == "end":
                return self._end(tree, named), True
            return self._work(content, tree), False
        except WeftError as error:
            self.say(str(error))
            self.ended = None if isinstance(error, RunError) else error
            return letters.letter("failure", named, reason=str(error)), False

    # --- before round 1

    def _meet(self, tree: dict[str, Any]) -> bytes:
        """Look at the job, ask once, keep what was accepted; raise PolicyError for what is not."""
        values = letters.field_of(tree, "values", dict)
        policies.check_code(self.own.policy, values)
        job = _parsed(values, str(tree.get("job")), self.own)
        asked = summary(job, self.own)
        policies.check(self.own.policy, asked.asked)
        if not self._accepted(job, asked):
            raise PolicyError(f"{self.own.name} did not accept the job {job.hash()[:_SHORTEST]}")
        if self.job is None or job.hash() != self.job.hash():
            self.job, self.exact, self._site = job, tree.get("exact") is True, None
        kept = {"values": values, "hash": job.hash(), "exact": self.exact}
        write_safely(self.own.folder / "accepted.json", json.dumps(kept, indent=1).encode())
        return letters.letter("accepted", job.hash())

    def _accepted(self, job: Job, asked: Summary) -> bool:
        if self.job and self.job.hash() == job.hash():
            return True
        if self.own.accept is not None:
            return len(self.own.accept) >= _SHORTEST and job.hash().startswith(self.own.accept)
        return self.confirm(asked)

    def recall(self) -> None:
        """Take up the job that was accepted before this process began, if there is one."""
        path = self.own.folder / "accepted.json"
        if path.is_file():
            kept = json.loads(path.read_bytes())
            policies.check_code(self.own.policy, kept["values"])
            self.job, self.exact = _parsed(kept["values"], kept["hash"], self.own), kept["exact"]

    # --- the work

    def _work(self, content: bytes, tree: dict[str, Any]) -> bytes:
        """Answer an order or a question; an order that comes again gets the very reply that it got."""
        if self.job is None or tree["job"] != self.job.hash():
            raise RunError(f"{self.own.name} has not accepted the job {str(tree['job'])[:_SHORTEST]}")
        digest = hashlib.sha256(content).hexdigest()
        if tree["is"] == "order" and self._last[0] == digest:
            return self._last[1]
        self._say_work(tree)
        point(f"asked:{tree.get('kind')}")
        with exactly(self.exact):
            site = self._ready()
            if site.loaded.size < TINY:
                torch.set_num_threads(1)  # more would only wait for each other, as in a simulation
            if tree["is"] == "order" and tree.get("kind") == "train":
                self._count(site, letters.order_of(tree))
            reply = letters.answer(Reporting(site, self._facts), content, self.job.hash())
        if tree["is"] == "order" and letters.opened(reply, ("replies", "failure"), "")["is"] == "replies":
            self._last = (digest, reply)
        return reply

    def _count(self, site: Site, order: Order) -> None:
        """Write down what a round tells of this site's records; raise PolicyError where that is too much."""
        assert self.job
        own, examples = self.own, site.train[self.own.name]
        if cost := cost_of(self.job, site.plan.recipe, site.wire, len(examples)):
            began = [trees.digest(order.state), order.since, order.cohort, order.length]
            row = {
                "job": self.job.hash(),
                "round": order.round,
                "secret": site.secret.name,
                "state": hashlib.sha256(json.dumps(began).encode()).hexdigest(),
                "data": self._read,
            }
            Told(own.ledger).count(row, cost, own.policy.max_epsilon, own.policy.delta)

    def _say_work(self, tree: dict[str, Any]) -> None:
        if tree["is"] == "order" and tree.get("kind") == "train":
            self.say(f"round {tree.get('round')}: training")
        elif tree["is"] == "order":
            self.say(f"round {tree.get('round')}: measuring on this site's test records; sums leave, no record does")

    def _ready(self) -> Site:
        """Load the base and encode the records, once."""
        if self._site is None:
            assert self.job
            self.say(f"loading {self.own.model} and {self.own.train}")
            prepared = at_site(_with_model(self.job, self.own), self.own.name, self.own.train, self.own.test)
            bench = prepare.set_up(prepared)
            for notice in bench.notices:
                self.say(notice)
            self._classes, self._read = prepared.classes, prepared.train.sha256
            self._records = {"test": len(prepared.test.records)}
            hidden = pipeline.check(prepared.plan.pipeline).hidden
            if not hidden or prepared.plan.recipe.dp:  # whose privacy is accounted for by it
                self._records["train"] = len(prepared.train.records)
            folder = self.own.folder / self.job.hash()[:16]
            members = self._members(self.job, folder) if hidden else {}
            self._site = bench.site(folder, "federated", 1 if self.exact else 0, self.say, members)
        return self._site

    def _members(self, job: Job, folder: Path) -> dict[str, secure.Member]:
        """Return this site's half of secure aggregation, by its own key and those of the job that it accepted."""
        return {self.own.name: pinned(job).member(self.own.name, self.own.identity, folder / "clients")}

    def _facts(self, described: Mapping[str, Any]) -> dict[str, Any]:
        return agree.facts(described, self._classes) | {"records": self._records}

    def _end(self, tree: dict[str, Any], named: str) -> bytes:
        """Keep the adapter of a finished run; remember why another one ended."""
        reason, files = tree.get("reason"), letters.field_of(tree, "adapter", dict)
        if reason:
            self.ended = self.ended or RunError(f"the coordinator ended the run: {str(reason)[:1000]}")
        folder = self.own.folder / "adapter"
        for name in ADAPTER_FILES:
            if isinstance(files.get(name), bytes):
                folder.mkdir(exist_ok=True)
                write_safely(folder / name, files[name])
        if files:
            self.say(f"the run is finished; its adapter is in {folder}")
        return letters.letter("accepted", named)


@dataclass(frozen=True)
class Reporting:
    """A site that says a little more of itself than a simulated one."""

    site: Site
    facts: Callable[[Mapping[str, Any]], dict[str, Any]]

    def handle(self, order: Order) -> Iterator[Any]:
        """Let the site handle an order."""
        return self.site.handle(order)

    def answer(self, question: Question) -> Any:
        """Let the site answer, and add the facts that sites are compared by."""
        answer = self.site.answer(question)
        return {**answer, **self.facts(answer)} if question.kind == "describe" else answer


def join(address: str, own: Own, ca: Path, confirm: Confirm, say: Callable[[str], None]) -> None:
    """Take part in the run of a coordinator until it ends.

    Raise PolicyError where either side refuses, JobError for what is wrong with this site's own files, RunError where
    the run fails or the coordinator stays away.
    """
    policies.limit_memory(own.policy)
    make_folder(own.folder)
    member = Member(own, confirm, say)
    with locked(own.folder):
        member.recall()
        node = Node(address, own.identity, ca, say, own.policy.patience, own.policy.max_message_mb << 20)
        node.serve(member.answer)
    if member.ended:
        raise member.ended


def _parsed(values: dict[str, Any], announced: str, own: Own) -> Job:
    """Return the job of a letter; raise PolicyError for one that is not what its hash says, or not for this site."""
    try:
        job = Job(**values, folder=Path.cwd())
    except (JobError, TypeError) as error:
        raise PolicyError(f"the coordinator sent a job that this Weft cannot read: {error}") from None
    if job.hash() != announced:
        raise PolicyError("the coordinator sent a job that is not the one that its hash names; other versions of Weft?")
    if own.name not in job.sites:
        raise PolicyError(f"the job {announced[:_SHORTEST]} does not name {own.name}; it names {', '.join(job.sites)}")
    if job.sites[own.name].key != own.identity.public:
        raise PolicyError(f"the job {announced[:_SHORTEST]} has another key for {own.name} than this site's")
    return job


def _with_model(job: Job, own: Own) -> Job:
    """Return the job with this machine's model in place of the coordinator's name for it."""
    model = job.model.model_copy(update={"name": own.model, "revision": None})
    return job.model_copy(update={"model": model})
