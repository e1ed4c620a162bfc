"""Take an adapter out of a run: the shared one or a client's own, as it is, or merged into its base."""

import shutil
from pathlib import Path

from weft.core.errors import JobError, near
from weft.runs import Run


def export(run: Run, to: Path, merge: bool, client: str | None = None) -> Path:
    """Write the adapter, or the merged model with its tokenizer, into a new folder and return it.

    client: the adapter of this client, where each has its own. The folder appears whole or not at all.
    """
    run.check()
    adapter = run.folder / "adapter"
    if not (adapter / "adapter_model.safetensors").is_file():
        raise JobError(f"{run.folder} holds no adapter yet; finish the run with `weft run JOB --resume`")
    if to.exists():
        raise JobError(f"--to {to}: exists already; name a new folder")
    if not to.parent.is_dir():
        raise JobError(f"--to {to}: there is no folder {to.parent}; make it first")
    unfinished = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        if client is not None:
            adapter = _own(run, client, unfinished.with_name(f".{to.name}.own"))
        if merge:
            _merge(run, adapter, unfinished)
        else:
            shutil.copytree(adapter, unfinished)
        unfinished.rename(to)
    finally:
        for left in (unfinished, unfinished.with_name(f".{to.name}.own")):
            shutil.rmtree(left, ignore_errors=True)
    return to


def _own(run: Run, client: str, folder: Path) -> Path:
    """Write the adapter that one client of a simulation uses, from what it kept, and return its folder."""
    from weft import prepare
    from weft.core.types import Question
    from weft.run_folder import write_adapter
    from weft.store import Store

    prepared = prepare.prepare(run.job)
    algorithm = prepared.plan.algorithm
    if client not in prepared.clients:
        raise JobError(f"--client {client}: is no client of this run{near(client, list(prepared.clients))}")
    if not algorithm.personal:
        raise JobError(f"--client: all clients of {prepared.job.algorithm.name} use one adapter; leave it out")
    server, _ = Store(run.folder, run.job.hash()).latest()
    if server is None:
        raise JobError(f"{run.folder} holds no checkpoint; run the job again")
    site = prepare.set_up(prepared).site(run.folder, "federated", 0, lambda text: None)
    described = site.answer(Question("describe", {"base": prepared.base.path}))
    write_adapter(folder, prepared.adapter, site.used(server, client), described)
    return folder


def _merge(run: Run, adapter: Path, to: Path) -> None:
    from weft import plugins
    from weft.adapters.folder import load_adapter

    job = run.job
    if job.model.quantize:
        raise JobError(
            "--merge: the base is quantised, and merged weights would be rounded anew; export the adapter as it is, "
            "and merge it with peft into the base in full precision"
        )
    if not plugins.build(job.adapter, "adapter").mergeable:
        raise JobError(f"--merge: a {job.adapter.name} adapter cannot be merged into its base; export it as it is")
    net, tokenizer = run.base()
    adapted = load_adapter(net, adapter)  # an adapter of the base's own parameters is in place already
    (adapted.merge_and_unload() if hasattr(adapted, "merge_and_unload") else adapted).save_pretrained(to)
    tokenizer.save_pretrained(to)
