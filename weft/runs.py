"""Run a job into a folder: rounds, baselines, final measurements, adapter, report; resume where it stopped."""

import json
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from weft import fingerprints, journal, ledger, prepare
from weft.core import pipeline
from weft.core.buffered import advance
from weft.core.errors import JobError
from weft.core.round import Federation
from weft.core.types import Link, Question, Server, Tensors
from weft.files import make_folder, write_safely
from weft.fleet import Places, opened
from weft.job import Job, load
from weft.peak import peak_mb
from weft.run_folder import check_folder, clear, read_json, write_adapter
from weft.scores import Scorer
from weft.site.resident import Resident
from weft.site.secret import secret_of
from weft.spending import Account, Ledger, privacy_of, told
from weft.store import Store, locked
from weft.threads import exactly, threads_for
from weft.watch import Watch


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    folder: Path

    @property
    def results(self) -> dict[str, Any]:
        """Return results.json: metrics of every method, per group and overall."""
        path = self.folder / "results.json"
        if not path.is_file():
            raise JobError(
                f"{self.folder} holds no finished run (no results.json); finish it with `weft run JOB --resume`"
            )
        return read_json(path)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return one flat row a round, ready for pandas.DataFrame."""
        return [_flat(row) for row in journal.read(self.folder / "journal.jsonl")]

    @property
    def job(self) -> Job:
        """Return the job, resolved, with its paths as they were."""
        self.check()
        start = read_json(self.folder / "run.json")
        if not (self.folder / "job.yaml").is_file():
            raise JobError(f"{self.folder} has lost its job.yaml; run the job again, or put its job file back there")
        return load(self.folder / "job.yaml").model_copy(update={"folder": Path(start["folder"])})

    def adapter(self) -> Tensors:
        """Return the global adapter's tensors, by peft's names."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / "adapter" / "adapter_model.safetensors"
        if not path.is_file():
            raise JobError(f"{self.folder} holds no adapter yet; finish the run with `weft run JOB --resume`")
        try:
            tensors: Tensors = load_file(path)
        except SafetensorError as error:
            raise JobError(f"{path} is damaged ({error}); run the job again") from None
        return tensors

    def base(self) -> tuple[Any, Any]:
        """Return the untrained base model and its tokenizer, as transformers loads them."""
        return load_base(self.job, self.results["classes"])

    def check(self) -> None:
        """Raise JobError where the folder is not a run."""
        if not (self.folder / "run.json").is_file():
            raise JobError(f"{self.folder} is not a run folder: it has no run.json; name the --out of a `weft run`")
        for name in ("run.json", "results.json"):
            if (self.folder / name).is_file():
                read_json(self.folder / name)


def load_base(job: Job, classes: Sequence[str]) -> tuple[Any, Any]:
    """Return the base model that a job names, without an adapter, and its tokenizer (with pictures, a `Processor`)."""
    from weft import plugins
    from weft.site.model import Base, network, reader_of

    model = job.model
    base = Base(model.name, job.folder, model.revision, model.dtype, model.random, model.quantize)
    task = plugins.build(job.task, "task")
    tokenizer = reader_of(base, task)
    return network(base, task, tuple(classes), job.seed, tokenizer), tokenizer


def folder_of(job: Path) -> Path:
    """Return the run folder of a job file that names no other."""
    return Path("runs") / job.stem


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
    flat["cohort"] = len(row.get("cohort", []))
    for name, value in row.get("evaluation", {}).get("overall", {}).items():
        flat[f"test_{name}"] = value
    clients = row.get("clients", {})
    if clients and all("loss" in client for client in clients.values()):
        weight = sum(client["weight"] for client in clients.values())
        flat["train_loss"] = sum(client["loss"] * client["weight"] for client in clients.values()) / weight
    return flat


def run(
    job: Job | Path | str,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    exact: bool = False,
    block: int = 0,
    threads: int = 0,
    devices: str = "",
    on: str = "",
    address: str = "",
    watch: Watch | None = None,
    resident: Resident | None = None,
    report: bool = True,
) -> Run:
    """Run a job, simulated on this machine, and return the finished run.

    out: the run folder; `runs/<job file's name>` when not given. resume: go on where a run in it stopped.
    overwrite: delete a run that is in it, once the job is known to be sound.
    exact: one client at a time, one thread, deterministic kernels: another machine of this kind gives the same bytes.
    block: clients trained in one pass; 0: as many as fill a step. threads: of the processor; 0: one for a tiny base,
    for which more only wait for each other, else torch's own number.
    devices: a worker process with a base of its own for each, such as `cpu*2`, `cuda` (every GPU) or `cuda:0,cuda:1`;
    threads and base are then those of each worker. on: `ray`, workers on a Ray cluster, that at `address` where given.
    Results do not depend on them.
    resident: keeps the base for a next run over the same one. report: write report.html, which takes a moment.
    Raise JobError for a job that cannot run, PolicyError where the folder holds something else, RunError for a
    run that failed on the way.
    """
    folder = Path(out or folder_of(Path("job" if isinstance(job, Job) else job)))
    job = job if isinstance(job, Job) else load(job)
    check_folder(folder, job, resume, overwrite)
    if resume:
        began = read_json(folder / "run.json")
        exact, block, threads = began["exact"], began["block"], began["threads"]
    places = Places(devices, on, address)
    prepared = prepare.prepare(job)
    with exactly(exact), ExitStack() as stack:
        bench: Stage
        if places:
            bench = stack.enter_context(opened(prepared, places, exact=exact, threads=threads))
            threads = bench.threads
        else:
            bench = prepare.set_up(prepared, resident)
            threads = threads_for(bench.loaded.size, exact, threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        with locked(folder):
            if overwrite:
                clear(folder)
            return Runner(folder, bench, watch or Watch(), exact, block, threads, report).run()


AGGREGATION = "Bonawitz 2017, double masks"


def run_prepared(folder: Path, bench: prepare.Bench) -> Run:
    """Run a job that is set up already into a new folder, in silence."""
    with locked(folder):
        return Runner(folder, bench, Watch(), False, 0, torch.get_num_threads()).run()


class Stage(Protocol):
    """Where a run takes place: `prepare.Bench` is this machine, `deploy.serve` real sites."""

    @property
    def prepared(self) -> prepare.Prepared:
        """Return the checked job."""

    @property
    def notices(self) -> tuple[str, ...]:
        """Return what a person should know before it begins."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Return what is run, the federation first."""

    def link(self, method: str, folder: Path, block: int, watch: Watch) -> Link:
        """Return the way to the clients of one method, whose memories are kept under a folder."""

    def federation(self, method: str) -> Federation:
        """Return the rounds of one method."""

    def manifest(self) -> dict[str, Any]:
        """Return which record is where, as far as this machine knows."""

    @property
    def simulated(self) -> bool:
        """Tell whether all clients are in this process."""

    def account(self) -> Account:
        """Return what the rounds spend of privacy."""


@dataclass
class Runner:
    """The steps of a run, each of which can be repeated after a crash without changing the result."""

    folder: Path
    bench: Stage
    watch: Watch
    exact: bool
    block: int
    threads: int
    report: bool = True
    halted: str | None = None
    """Why the privacy budget has no room for another round."""

    def run(self) -> Run:
        """Do all of it, and return the finished run."""
        job = self.bench.prepared.job
        self._start(job)
        for notice in self.bench.notices:
            self.watch.notice(notice)
        link = self._link("federated", self.folder)
        described = link.ask(Question("describe", {"base": self.bench.prepared.base.path}))[0]
        self._remember(described)
        finals: dict[str, Any] = {}
        for method in self.bench.methods:
            if method == "untrained":
                finals[method] = self._scorer("federated", described["adapter"]).untrained(self._metrics())
                continue
            scorer = self._scorer(method, described["adapter"])
            private = self._private(scorer, described) if method == "federated" else None
            server = self._rounds(method, scorer, private)
            finals[method] = scorer.final(server, self._metrics())
            if method == "federated":
                self._export(server, scorer.federation, described)
        self._finish(finals, described)
        return Run(self.folder)

    def _start(self, job: Job) -> None:
        start = {
            "job": job.hash(),
            "folder": str(job.folder.resolve()),
            "exact": self.exact,
            "block": self.block,
            "threads": self.threads,
        }
        write_safely(self.folder / "run.json", json.dumps(start, indent=1).encode())  # first: it makes the folder a run
        text = yaml.safe_dump(job.resolved(), sort_keys=False, allow_unicode=True)
        write_safely(self.folder / "job.yaml", text.encode())

    def _remember(self, described: dict[str, Any]) -> None:
        """Keep what the run is made of; refuse to resume over another base, tokenizer or data."""
        path = self.folder / "base.json"
        facts = {key: described[key] for key in ("trainable", "total", *fingerprints.SITE)}
        facts |= fingerprints.of_data(self.bench.prepared.train, self.bench.prepared.test)
        facts["versions"] = fingerprints.versions()
        if path.is_file():
            for notice in fingerprints.compare(read_json(path), facts, self.folder):
                self.watch.notice(notice)
        write_safely(path, json.dumps(facts, indent=1).encode())
        write_safely(self.folder / "split.json", json.dumps(self.bench.manifest(), sort_keys=True).encode())

    def _folder(self, method: str) -> Path:
        return self.folder if method == "federated" else self.folder / "baselines" / method

    def _link(self, method: str, folder: Path) -> Link:
        return self.bench.link(method, folder, 1 if self.exact else self.block, self.watch)

    def _scorer(self, method: str, adapter: Tensors) -> Scorer:
        """Return what measures a method: its rounds and its link."""
        federation = replace(self.bench.federation(method), initial=adapter)
        if federation.wire.noise or federation.wire.spread:
            federation = replace(federation, secret=secret_of(self.folder).key)
        folder = self._folder(method)
        make_folder(folder)
        return Scorer(self._link(method, folder), federation, self.bench.prepared.task.summarize)

    def _private(self, scorer: Scorer, described: dict[str, Any]) -> Ledger | None:
        """Return the privacy ledger and say what the rounds will spend; None where nothing is noised."""
        account = self.bench.account()
        for sentence in told(account, scorer.federation, self.bench.prepared.job.rounds):
            self.watch.notice(sentence)
        return Ledger(self.folder / "privacy.jsonl", account, described["secret"]) if account.levels else None

    def _rounds(self, method: str, scorer: Scorer, private: Ledger | None = None) -> Server:
        """Run, or go on with, all rounds of one method."""
        job, federation = self.bench.prepared.job, scorer.federation
        store = Store(self._folder(method), job.hash())
        server, notices = store.latest()
        for notice in notices:
            self.watch.notice(notice)
        if server is None:
            server = Server(federation.algorithm.init(federation.initial))
            store.commit(server, {"round": 0} | self._evaluation(scorer, server))
        self.watch.begin(method, server.round, job.rounds, federation.per_round)
        while server.round < job.rounds and not (method == "federated" and self._spent()):
            if private and (halted := private.spend(server, federation)):
                self.halted = halted
                break
            start = time.perf_counter()
            server, record = advance(server, federation, scorer.link)
            trained = time.perf_counter()
            record |= self._evaluation(scorer, server) | ({"epsilon": private.epsilon} if private else {})
            ended = time.perf_counter()
            record["seconds"] = {"round": trained - start, "evaluation": ended - trained}
            record["peak_memory_mb"] = peak_mb()
            store.commit(server, record)
            self.watch.round(method, server.round, _flat(record))
        return server

    def _spent(self) -> str | None:
        """Say why no other round is begun, where the budget has no room for it."""
        return ledger.spent(self.folder / "journal.jsonl", self.bench.prepared.job.budget.megabytes)

    def _evaluation(self, scorer: Scorer, server: Server) -> dict[str, Any]:
        """Measure the loss now, where the job asks for it; a personal method is measured at the end alone."""
        job = self.bench.prepared.job
        due = job.evaluate.every and (server.round % job.evaluate.every == 0 or server.round == job.rounds)
        if not due or scorer.federation.algorithm.personal:
            return {}
        return {"evaluation": scorer.shared(server, ("loss",))}

    def _metrics(self) -> tuple[str, ...]:
        prepared = self.bench.prepared
        return tuple(prepared.job.evaluate.on or prepared.task.metrics)

    def _export(self, server: Server, federation: Federation, described: dict[str, Any]) -> None:
        """Write the adapter of a client that was never asked, from tensors alone: the global one, if there is one."""
        algorithm, first = federation.algorithm, federation.initial
        shared = algorithm.serve(server.state, algorithm.keep(first), first)
        more = {f"adapters/{name}": held for name, held in algorithm.exports(server.state, first).items()}
        for place, adapter in {"adapter": shared, **more}.items():
            write_adapter(self.folder / place, self.bench.prepared.adapter, adapter, described)

    def _finish(self, finals: dict[str, Any], described: dict[str, Any]) -> None:
        rows = journal.read(self.folder / "journal.jsonl")
        early = rows and rows[-1]["round"] < self.bench.prepared.job.rounds
        stopped = self.halted or self._spent() if early else None
        if stopped:
            self.watch.notice(stopped)
        results = {
            "methods": {name: finals[name] for name in prepare.METHODS if name in finals},
            "metrics": list(self._metrics()),
            "classes": list(self.bench.prepared.classes),
            "rounds": rows[-1]["round"],
            "stopped": stopped,
            "clients": len(self.bench.prepared.clients),
            "bytes": {way: sum(row.get(f"bytes_{way}", 0) for row in rows) for way in ("up", "down")},
            "seconds": sum(row["seconds"]["round"] + row["seconds"]["evaluation"] for row in rows if "seconds" in row),
            "adapter": {key: described[key] for key in ("trainable", "total", "fingerprint")},
            **self._hidden(),
            "job": self.bench.prepared.job.hash(),
            **privacy_of(self.folder, self.bench.account()),
            "environment": environment(self.exact),
        }
        write_safely(self.folder / "results.json", json.dumps(results, indent=1).encode())
        if self.report:
            from weft.report import write_report

            write_report(self.folder)
        self.watch.end()

    def _hidden(self) -> dict[str, Any]:
        """Return the entry of results.json for updates that only their sum was seen of."""
        if not pipeline.check(self.bench.prepared.plan.pipeline).hidden:
            return {}
        return {"secure": {"aggregation": AGGREGATION, "simulated": self.bench.simulated}}


def environment(exact: bool) -> dict[str, Any]:
    """Return what the numbers depend on beside the job."""
    packages = fingerprints.versions()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return packages | {
        "python": platform.python_version(),
        "system": platform.system(),
        "device": device,
        "threads": torch.get_num_threads(),
        "exact": exact,
    }
