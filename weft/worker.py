"""A worker: one device with a base of its own; it trains and measures what letters ask, and decides nothing.

    python -m weft.worker SOCKET

It never outlives whoever started it: where its socket ends, so does the process, in the middle of a step as well.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from weft.links.letters import Tree
    from weft.prepare import Bench
    from weft.site.site import Site

TOKEN = ".workers"  # the file in a run folder by which workers on other machines know it


@dataclass
class Worker:
    """A letter in, a letter out: first `open`, then any number of others."""

    bench: "Bench | None" = None
    job: str = ""
    sites: dict[str, "Site"] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def answer(self, content: bytes) -> bytes:
        """Do what a letter asks; what fails is told in one sentence."""
        from weft.core.errors import WeftError
        from weft.links import letters

        tasks: dict[str, Callable[[Tree], Any]] = {
            "open": self._open,
            "facts": self._facts,
            "blocks": self._blocks,
            "order": self._order,
            "question": self._question,
        }
        try:
            tree = letters.opened(content, tasks, self.job)
            body = tasks[tree["is"]](tree)
            return letters.letter("answer", self.job, body=body, notices=self._told())
        except Exception as error:
            known = isinstance(error, WeftError)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            failed = {"kind": type(error).__name__ if known else "", "trace": traceback.format_exc()}
            return letters.letter("failure", self.job, reason=reason, notices=self._told(), **failed)

    def _told(self) -> list[str]:
        told, self.notices = self.notices, []
        return told

    def _open(self, tree: "Tree") -> "Tree":
        """Load the base and encode the records of a job."""
        import torch

        from weft.core.errors import RunError
        from weft.job import Job
        from weft.prepare import prepare, set_up
        from weft.threads import threads_for

        job = Job(**json.loads(tree["values"]), folder=Path(tree["folder"]))
        if job.hash() != tree["job"]:
            raise RunError("a worker reads the job otherwise; install the same Weft everywhere")
        torch.set_num_threads(max(1, tree["share"]))
        if tree["exact"]:
            torch.use_deterministic_algorithms(True)
        self.bench, self.job = set_up(prepare(job)), tree["job"]
        threads = threads_for(self.bench.loaded.size, tree["exact"], tree["threads"], tree["share"])
        torch.set_num_threads(threads)
        prepared = self.bench.prepared
        return {"mode": self.bench.mode, "threads": threads, "records": [prepared.train.sha256, prepared.test.sha256]}

    def _facts(self, tree: "Tree") -> "Tree":
        """Tell what only who encoded the records knows."""
        bench = self._ready()
        examples = {name: len(rows.examples) for name, rows in bench.train.items()}
        return {
            "notices": list(bench.notices),
            "examples": json.dumps(examples).encode(),
            "manifest": json.dumps(bench.manifest()).encode(),
            "groups": json.dumps({name: len(rows) for name, rows in bench.test.items()}).encode(),
        }

    def _ready(self) -> "Bench":
        from weft.core.errors import RunError

        if self.bench is None:
            raise RunError("a worker was asked before it was told of a job")
        return self.bench

    def _site(self, at: "Tree") -> "Site":
        """Return the site of a method, made once."""
        from weft.core.errors import RunError

        key, folder = json.dumps(at, sort_keys=True), Path(at["folder"])
        if key not in self.sites:
            token = folder / TOKEN
            if at["token"] and not (token.is_file() and token.read_text() == at["token"]):
                raise RunError(f"a worker does not see the run folder {folder}; put it where all machines have it")
            site = self._ready().site(folder, at["method"], at["block"], self.notices.append)
            self.sites[key] = replace(site, abreast=1)  # it is given one block at a time
        return self.sites[key]

    def _blocks(self, tree: "Tree") -> list[list[str]]:
        from weft.core.types import Order

        order = Order("train", tree["round"], tuple(tree["clients"]), {}, tree["since"])
        return [list(names) for names in self._site(tree["at"]).blocks(order)]

    def _order(self, tree: "Tree") -> "list[Tree]":
        from weft.links import letters

        site, groups = self._site(tree["at"]), tree["groups"]
        if groups:
            site = replace(site, test={name: site.test[name] for name in groups})
        return [letters.reply_tree(reply) for reply in site.handle(letters.order_of(tree))]

    def _question(self, tree: "Tree") -> Any:
        from weft.links import letters

        return self._site(tree["at"]).answer(letters.question_of(tree))


def _read(channel: "Connection", inbox: "queue.SimpleQueue[bytes]") -> None:
    """Take letters in; end the process where there are no more."""
    while True:
        try:
            inbox.put(channel.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)


def main() -> None:
    """Answer letters until the socket ends; Ctrl-C is for whoever started this process."""
    from multiprocessing.connection import Connection

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel: Connection = Connection(int(sys.argv[1]))
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, inbox), daemon=True).start()
    worker = Worker()
    while True:
        channel.send_bytes(worker.answer(inbox.get()))


if __name__ == "__main__":
    main()
