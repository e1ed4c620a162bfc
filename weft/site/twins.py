"""Blocks side by side in one process: a thread each, with a twin of the model over the same frozen memory.

Each thread computes alone, so that a core is not kept waiting at every small product, and a block ends with the same
bits in whatever thread it is trained. Python itself runs one thread at a time, but the time is spent in products.
"""

import copy
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import TypeVar

import torch

from weft.site.below import layers_below
from weft.site.cohort import Cohort
from weft.site.lift import Lift
from weft.site.model import Loaded, places_of

Task = TypeVar("Task")
Result = TypeVar("Result")


def twin(loaded: Loaded) -> Loaded:
    """Return a model of modules of its own over the very same tensors."""
    shared = {id(tensor): tensor for tensor in (*loaded.net.parameters(), *loaded.net.buffers())}
    net = copy.deepcopy(loaded.net, dict(shared))
    places, initial = places_of(net)
    below = replace(loaded.below, layers=layers_below(net))
    return replace(loaded, net=net, places=places, initial=initial, lift=Lift(net, places), below=below)


def side_by_side(
    cohorts: Sequence[Cohort], tasks: Sequence[Task], do: Callable[[Cohort, Task], Result]
) -> Generator[Result]:
    """Do tasks in order, each on the cohort that is free first; yield what comes, as it comes.

    What fails is raised here. When the caller turns away, the others stop before their next step.
    """
    threads = torch.get_num_threads()
    waiting, results, halt = iter(tasks), SimpleQueue[Result | BaseException](), threading.Event()
    lock = threading.Lock()

    def work(cohort: Cohort) -> None:
        torch.set_num_threads(max(1, threads // len(cohorts)))  # a thread's own setting
        own = replace(cohort, halt=halt.is_set)
        while not halt.is_set():
            with lock:
                task = next(waiting, None)
            if task is None:
                return
            try:
                results.put(do(own, task))
            except BaseException as error:  # raised again where somebody sees it
                results.put(error)
                return

    team = [threading.Thread(target=work, args=(cohort,), daemon=True) for cohort in cohorts]
    try:
        for thread in team:
            thread.start()
        for _ in tasks:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        halt.set()
        for thread in team:
            thread.join()
        torch.set_num_threads(threads)  # the products' library has one setting for all
