"""Before round 1: do blocks give this model's own gradients? Numbers decide how a site trains, and it says so."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from weft.core import keys
from weft.core.task import Example
from weft.core.types import Tensors
from weft.site import packing
from weft.site.cohort import Cohort, Layout, Mode

LONGEST = 48  # tokens of an example in the check: enough to be ragged, few enough to cost nothing


def choose(cohort: Cohort, examples: Sequence[Example]) -> tuple[Mode, str | None]:
    """Return the fastest mode that gives the plain model's gradients, and a notice where it is not the first choice.

    Two clients with ragged examples go through the block and, one by one and padded, through the plain model.
    """
    if len(examples) < 2 * cohort.task.least + 1:
        return "single", None
    rows = _ragged(cohort, examples)
    expected = _gradients(replace(cohort, mode="single"), rows, together=False)
    reasons: list[str] = []
    modes: list[Mode] = ["padded"]
    if cohort.task.pack and packing.supported(cohort.loaded.net):
        modes.insert(0, "packed")
    for mode in modes:
        reason = _differs(replace(cohort, mode=mode), rows, expected)
        if reason is None:
            return mode, f"{reasons[0]}; examples are padded" if reasons else None
        reasons.append(f"{mode} blocks: {reason}")
    return "single", f"clients are trained one by one, since {' and '.join(reasons)}"


def _ragged(cohort: Cohort, examples: Sequence[Example]) -> list[list[Example]]:
    """Return two and one examples of unlike length, cut short; one more each where the task compares examples."""
    short, least = [], cohort.task.least
    for number, example in enumerate(islice(sorted(examples, key=cohort.task.length), 2 * least + 1)):
        short.append(cohort.task.shorten(example, LONGEST - 8 * number))
    return [short[: least + 1], short[least + 1 :]]


def _params(cohort: Cohort) -> Tensors:
    """Return unlike adapters for two clients: at the start some gradients are zero and would prove nothing."""
    return {
        name: torch.stack(
            [
                value.detach()
                + 0.05 * torch.randn(value.shape, generator=keys.generator(0, "selfcheck", name, k)).to(value.device)
                for k in range(2)
            ]
        )
        for name, value in cohort.loaded.initial.items()
    }


def _gradients(cohort: Cohort, rows: Sequence[Sequence[Example]], together: bool) -> Tensor:
    """Return the gradient of each client's summed loss, (clients, numbers); without dropout, whose draws may differ."""
    params = _params(cohort)
    layout = Layout({name: tuple(value.shape[1:]) for name, value in params.items()})
    flat = layout.flat(params).requires_grad_()
    seeds = [keys.number(0, "selfcheck", k) for k in range(2)]
    if together:
        cohort.losses(layout.named(flat), rows, seeds)
    else:
        for k in range(2):
            cohort.losses(layout.named(flat[k : k + 1]), rows[k : k + 1], seeds[k : k + 1])
    assert flat.grad is not None
    return flat.grad


def _differs(cohort: Cohort, rows: Sequence[Sequence[Example]], expected: Tensor) -> str | None:
    try:
        got = _gradients(cohort, rows, together=True)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:
        return str(error).splitlines()[0][:200]
    kinds = {parameter.dtype for parameter in cohort.loaded.net.parameters()}
    exact = kinds <= {torch.float32, torch.uint8}  # 8-bit layers round their inputs too; 4-bit ones (uint8) do not
    allowed = (1e-3 if exact else 0.1) * float(expected.abs().max()) + 1e-7
    worst = float((got - expected).abs().max())
    return None if worst <= allowed else f"a gradient differs by {worst:.1e} from the plain model's"
