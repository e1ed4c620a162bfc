"""Measuring an adapter at a site: in less time by the leaner forwards, with the numbers of the plain model."""

from pathlib import Path

import pytest

from weft.adapters.lora import lora
from weft.algorithms.fedavg import fedavg
from weft.core.metrics import added
from weft.site.cohort import Cohort, Mode
from weft.site.memory import Memory
from weft.site.site import Plan, Site
from weft.tasks.causal_lm import causal_lm
from weft.testing.families import RECIPE, equipped
from weft.testing.tiny import RECORDS


def measured(mode: Mode, folder: Path) -> tuple[float, set[type]]:
    """Return the loss of a moved adapter, and the classes whose forwards were others meanwhile."""
    adapter, task, taken = lora(rank=2, targets=["q_proj"]), causal_lm(), set[type]()
    loaded = equipped(adapter, task, "llama")
    head = loaded.net.get_output_embeddings()
    head.register_forward_pre_hook(
        lambda *given: taken.update(type(found) for found in loaded.net.modules() if "forward" in vars(found))
    )
    rows = task.encode(loaded.tokenizer, RECORDS[:6], ()).examples
    cohort = Cohort(loaded, task, RECIPE, 7, mode, loaded.lift)
    plan = Plan(task, adapter, fedavg(), [], RECIPE, 7)
    site = Site(plan, loaded, cohort, {"one": rows}, {"all": rows}, Memory(folder))
    moved = {name: value + 0.1 for name, value in site.initial.items()}
    sums = added(site.measure(moved, rows, ("loss",)))
    assert not [module for module in loaded.net.modules() if "forward" in vars(module)]
    return task.summarize(sums)["loss"], taken


def test_the_leaner_forwards_measure_what_the_plain_model_does(tmp_path: Path) -> None:
    """The control: where the self-check left the plain model to train with, it measures too."""
    plain, none = measured("single", tmp_path)
    packed, taken = measured("packed", tmp_path)
    names = {kind.__name__ for kind in taken} - {kind.__name__ for kind in none}
    assert {"LlamaMLP", "LlamaRMSNorm"} <= names
    assert packed == pytest.approx(plain, rel=1e-5)
