"""Ask the model of a finished run, and the untrained base beside it."""

from typing import Any

import torch

from weft.adapters.folder import load_adapter
from weft.core.errors import JobError
from weft.core.task import Probe
from weft.runs import Run, load_base
from weft.tasks.prompts import pieces
from weft.tasks.text_metrics import generate


def ask(run: Run, question: str, tokens: int) -> dict[str, str]:
    """Return the answers of the untrained base and of the federated model, greedily decoded."""
    job = run.job
    if not question.strip():
        raise JobError("the question is empty; ask it in quotes, as in `weft ask RUN 'What is ...?'`")
    if "template" not in job.task.keys:
        raise JobError(f"{run.folder}: a {job.task.name} model has labels, not answers; `ask` needs causal_lm")
    run.adapter()  # says what is wrong with the file before a model is loaded
    net, tokenizer = load_base(job, ())
    example = _prompt(question, str(job.task.keys["template"]), tokenizer, whole=job.task.name == "seq2seq")

    def answer(model: Any) -> str:
        model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        return generate(Probe(model, tokenizer, 1, tokens, None), [example])[0]

    before = answer(net)
    return {"untrained base": before, "federated": answer(load_adapter(net, run.folder / "adapter"))}


def _prompt(question: str, template: str, tokenizer: Any, whole: bool) -> dict[str, object]:
    """Return a question as tokens; `whole`: as an encoder reads it, with the marks that the tokenizer writes."""
    own = template if template in ("auto", "chat", "plain") or "{question}" in template else "plain"
    record = {"question": question, "answer": "."}
    text = "".join(part.text for part in pieces(record, own, tokenizer) if not part.learned)
    if whole:
        return {"ids": torch.tensor(tokenizer(text, verbose=False)["input_ids"])}
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    start = first if first == [tokenizer.bos_token_id] else []
    ids = start + tokenizer(text, add_special_tokens=False)["input_ids"]
    return {"ids": torch.tensor(ids), "prompt": len(ids)}
