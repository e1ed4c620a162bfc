"""Ask the model of a finished run, and the untrained base beside it."""

from weft import plugins
from weft.core.errors import JobError
from weft.core.types import Adapter, Probe, Task
from weft.job import Job
from weft.runs import Run
from weft.site.model import Base, Loaded, load, peft_names
from weft.tasks.prompts import pieces
from weft.tasks.text_metrics import generate


def _loaded(job: Job) -> Loaded:
    task: Task = plugins.build(job.task, "task")
    adapter: Adapter = plugins.build(job.adapter, "adapter")
    model = job.model
    base = Base(model.name, job.folder, model.revision, model.dtype, model.random)
    return load(base, adapter, task, (), job.seed)


def ask(run: Run, question: str, tokens: int) -> dict[str, str]:
    """Return the answers of the untrained base and of the federated model, greedily decoded."""
    job = run.job
    if not question.strip():
        raise JobError("the question is empty; ask it in quotes, as in `weft ask RUN 'What is ...?'`")
    if job.task.name != "causal_lm":
        raise JobError(f"{run.folder}: a {job.task.name} model has labels, not answers; `ask` needs causal_lm")
    saved = run.adapter()
    loaded = _loaded(job)
    example = _prompt(question, str(job.task.keys["template"]), loaded)
    names = peft_names(loaded.net)
    adapters = {
        "untrained base": loaded.initial,
        "federated": {name: saved[names[name]].to(loaded.device) for name in loaded.initial},
    }
    answers = {}
    for label, adapter in adapters.items():
        loaded.net.eval()
        with loaded.holding(adapter) as net:
            answers[label] = generate(Probe(net, loaded.tokenizer, 1, tokens, None), [example])[0]
    return answers


def _prompt(question: str, template: str, loaded: Loaded) -> dict[str, object]:
    import torch

    own = template if template in ("auto", "chat", "plain") or "{question}" in template else "plain"
    record = {"question": question, "answer": "."}
    parts = pieces(record, own, loaded.tokenizer)
    text = "".join(part.text for part in parts if not part.learned)
    first = loaded.tokenizer("a", verbose=False)["input_ids"][:1]
    start = first if first == [loaded.tokenizer.bos_token_id] else []
    ids = start + loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return {"ids": torch.tensor(ids), "prompt": len(ids)}
