"""What several algorithms refuse, each in one sentence."""

from collections.abc import Callable, Sequence

from weft.core import trees
from weft.core.errors import JobError, RunError
from weft.core.types import Facts, Reply, State, Tally, Tensors


def one_rank(name: str) -> Callable[[Facts], None]:
    """Return a check for a rule that needs the same shapes from every client."""

    def check(facts: Facts) -> None:
        if facts.mixed_ranks:
            raise JobError(
                f"{name} needs one rank for all clients: leave clients.ranks out, or choose hetlora, flexlora or flora"
            )

    return check


def at_least(name: str, least: int, key: str, value: int) -> Callable[[Facts], None]:
    """Return a check for a rule that is not defined for fewer than `least` clients a round, because of a key."""

    def check(facts: Facts) -> None:
        one_rank(name)(facts)
        if facts.per_round < least:
            raise JobError(
                f"{name} with {key} {value} needs {least} clients a round, and this job has {facts.per_round}: raise "
                f"clients.per_round, or lower {key}"
            )
        if least > 1 and not facts.fixed:
            raise JobError(
                f"{name} with {key} {value} needs {least} clients in every round, and this sampler may draw fewer: set "
                "clients.sampler to uniform"
            )

    return check


def adapters(replies: Sequence[Reply], state: State, tally: Tally, least: int = 1) -> list[Tensors]:
    """Return what each client trained; raise RunError, with its name, for one that is not like the state's.

    least: how many replies the rule is defined for.
    """
    if len(replies) < least:
        raise RunError(f"round {tally.round}: {len(replies)} replies are too few, the rule needs {least}")
    for reply in replies:
        if unlike := trees.difference(reply.update, {"adapter": state["adapter"]}):
            raise RunError(f"round {tally.round}: client {reply.client}: {unlike}")
    return [reply.update["adapter"] for reply in replies]


def low_rank(name: str, *, mixed: bool = False, still: bool = False, anew: bool = False) -> Callable[[Facts], None]:
    """Return a check for a rule on the two factors of LoRA.

    mixed: clients may have ranks of their own. still: some tensors must stay bit for bit while others are trained.
    anew: what is trained is not what the last round trained.
    """

    def check(facts: Facts) -> None:
        if not facts.low_rank:
            raise JobError(
                f"{name} works on the two factors of dW = B A, and {facts.adapter} as it is set has no such pairs: "
                "choose adapter lora without dora, or another algorithm"
            )
        if not mixed:
            one_rank(name)(facts)
        if still and facts.weight_decay:
            raise JobError(
                f"{name} keeps some tensors as they are while others are trained, and weight decay would shrink them: "
                "set local.weight_decay to 0"
            )
        if anew and facts.moments == "keep":
            raise JobError(
                f"{name} trains other tensors in each round, for which the optimizer's moments of the last mean "
                "nothing: set local.moments to reset"
            )

    return check
