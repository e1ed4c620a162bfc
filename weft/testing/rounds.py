"""Two federated rounds of three clients on a tiny model: does the loss fall, and does nothing else travel?"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weft.algorithms.fedavg import fedavg
from weft.core.round import Federation, run_round
from weft.core.task import Example, Task
from weft.core.types import Adapter, Link, Order, Question, Reply, Server, State
from weft.links.local import Local
from weft.scores import Scorer
from weft.site.cohort import Cohort
from weft.site.memory import Memory
from weft.site.selfcheck import choose
from weft.site.site import Plan, Site
from weft.testing.families import CLASSES, RECIPE, equipped
from weft.testing.sound import require
from weft.testing.tiny import RECORDS
from weft.transforms.weigh import weigh

CLIENTS, EXAMPLES = ("a", "b", "c"), 4


@dataclass(frozen=True)
class Watched:
    """A link that looks at what travels: the trained tensors, whole, and nothing beside them."""

    site: Site

    def exchange(self, order: Order) -> Iterator[Reply]:
        """Pass an order on, and the replies back."""
        trained = {name: tuple(p.shape) for name, p in self.site.loaded.net.named_parameters() if p.requires_grad}
        for sent in [order.state] if order.state else []:
            self._check(sent, trained)
        for reply in Local([self.site]).exchange(order):
            if reply.update:
                self._check(reply.update, trained)
            yield reply

    def ask(self, question: Question) -> Sequence[Any]:
        """Ask the site."""
        return [self.site.answer(question)]

    def _check(self, state: State, trained: dict[str, tuple[int, ...]]) -> None:
        sent = {name: tuple(tensor.shape) for name, tensor in state["adapter"].items()}
        require(set(state) == {"adapter"} and sent == trained, f"what travels is not what is trained: {sorted(sent)}")


def two_rounds(adapter: Adapter, task: Task, family: str, rate: float = 0.02) -> tuple[float, float]:
    """Return the loss of all clients' records before and after; raise AssertionError for a wrong payload."""
    loaded = equipped(adapter, task, family)
    classes = CLASSES if "Classification" in task.auto else ()
    found = task.encode(loaded.tokenizer, RECORDS[: len(CLIENTS) * EXAMPLES], classes).examples
    rows = loaded.referred(task, found, 8)
    data: dict[str, Sequence[Example]] = {
        name: rows[i * EXAMPLES : (i + 1) * EXAMPLES] for i, name in enumerate(CLIENTS)
    }  # fmt: skip
    recipe = replace(RECIPE, optimizer="adamw", lr=rate, batch=EXAMPLES, epochs=4, rounds=2, clip=1.0)
    mode, _ = choose(Cohort(loaded, task, recipe, 7, "single", loaded.lift), rows)
    cohort = Cohort(loaded, task, recipe, 7, mode, loaded.lift)
    pipeline, algorithm = [("weigh", weigh())], fedavg()
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(task, adapter, algorithm, pipeline, recipe, 7)
        site = Site(plan, loaded, cohort, data, {"all": rows}, Memory(Path(folder)))
        link: Link = Watched(site)
        federation = Federation(algorithm, pipeline, CLIENTS, len(CLIENTS), 7, adapter.products, site.initial)
        server, scorer = Server({"adapter": site.initial}), Scorer(link, federation, task.summarize)
        before = scorer.shared(server, ("loss",))
        for _ in range(2):
            server, _ = run_round(server, federation, link)
        after = scorer.shared(server, ("loss",))
    return before["overall"]["loss"], after["overall"]["loss"]
