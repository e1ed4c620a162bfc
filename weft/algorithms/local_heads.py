"""local_heads: some tensors stay at their client, named by patterns; the others are averaged as fedavg does.

Which stay is free: the new head of a classifier, so that clients may even disagree on what a label means, or some
layers. Arivazhagan et al. 2019, "Federated Learning with Personalization Layers", arXiv:1912.00818. What stays never
travels. A client that was never asked uses the shared tensors with the first ones in place of its own.
"""

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field

from weft.algorithms.refusals import one_rank
from weft.core import trees
from weft.core.errors import JobError
from weft.core.types import Algorithm, State, Tally, Tensors, Work


def local_heads(
    stays: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = ("*.modules_to_save.*",),
) -> Algorithm:
    """Average all tensors but those whose names match a pattern.

    stays: patterns of the names that stay at the client, such as `*.layers.3.*`; peft puts new heads below
    modules_to_save.
    """

    def matches(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in stays)

    shared = keeping(matches)

    def init(adapter: Tensors) -> State:
        found = [matches(name) for name in adapter]
        if all(found) or not any(found):
            word = "all" if all(found) else "none"
            raise JobError(
                f"algorithm.local_heads.stays: {list(stays)} match {word} of the {len(found)} trained tensors, which "
                f"are named as {next(iter(adapter))}"
            )
        return shared.init(adapter)

    return replace(shared, init=init, check=one_rank("local_heads"))


def keeping(stays: Callable[[str], bool]) -> Algorithm:
    """Return fedavg of the tensors that do not stay at their client."""

    def init(adapter: Tensors) -> State:
        return {"adapter": {name: value for name, value in adapter.items() if not stays(name)}}

    def keep(adapter: Tensors) -> State:
        return {"own": {name: value for name, value in adapter.items() if stays(name)}}

    def client(work: Work, received: State, kept: State) -> tuple[State, State]:
        ended = work.train(trees.merged(received["adapter"], kept["own"]))
        return init(ended), keep(ended)

    def server(state: State, update: State, tally: Tally) -> State:
        return {"adapter": update["adapter"]}

    def serve(state: State, kept: State, initial: Tensors) -> Tensors:
        return trees.merged(state["adapter"], kept["own"])

    return Algorithm(client=client, server=server, init=init, keep=keep, serve=serve, stale=True, personal=True)
