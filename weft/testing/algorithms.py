"""What every algorithm must pass, on a toy federation with partial participation and unequal clients."""

from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from weft.core import trees
from weft.core.failures import Policy
from weft.core.pipeline import Pipeline
from weft.core.sampling import Pool, Sampler
from weft.core.template import template
from weft.core.types import Algorithm, Link, State
from weft.links.local import Local
from weft.testing import toys
from weft.testing.sound import bits, guarded, require, require_float32, run_all, running
from weft.testing.toys import Direct, Losing, Toy, ToySite
from weft.transforms.clip import clip
from weft.transforms.delta import delta
from weft.transforms.weigh import weigh

MEAN: Pipeline = [("weigh", weigh())]
CLIPPED = 0.01  # length of an update where it is clipped
MakeAlgorithm = Callable[[], Algorithm]


def _outcome(make: MakeAlgorithm, **how: Any) -> Any:
    with running("the algorithm fails on the toy federation"):
        played = toys.play(make, MEAN, **{"toy": toys.toy(), **how})
    return bits([played.servers[-1].state, played.used])


def check_reply_order(make: MakeAlgorithm) -> None:
    """Give the same bits in whatever order clients train and reply."""
    same = _outcome(make, block=1, arrival=1) == _outcome(make, block=1, arrival=2)
    require(same, "the result depends on the order in which clients train and reply")


def check_block_size(make: MakeAlgorithm) -> None:
    """Give the same bits however many clients train together."""
    one, two, all_ = (_outcome(make, block=block) for block in (1, 2, 5))
    require(one == two == all_, "the result depends on which clients train in one block")


def check_resume(make: MakeAlgorithm) -> None:
    """Give the same bits when every round begins from a checkpoint with the algorithm made anew."""
    same = _outcome(make) == _outcome(make, restart=True)
    require(same, "a run that is stopped and resumed ends elsewhere; all that matters must be in the State")


def check_lost_replies(make: MakeAlgorithm) -> None:
    """Give the same bits when a round is repeated after its clients stored what they keep."""
    same = _outcome(make) == _outcome(make, lose=True)
    require(same, "a repeated round ends elsewhere; use the memory that is given, it is the one that counts")


def check_link_parity(make: MakeAlgorithm) -> None:
    """Give the same bits through bytes, without them, and from two sites in place of one."""

    def two(site: ToySite) -> Link:
        halves = [Toy({n: site.toy.clients[n] for n in names}, 3) for names in (("a", "c"), ("b", "d", "e"))]
        return Local([replace(site, toy=half) for half in halves])

    plain = _outcome(make)
    require(plain == _outcome(make, through=lambda site: Direct([site])), "the result depends on the link")
    require(plain == _outcome(make, through=two), "the result depends on which site a client lives at")


LOST, ROUND = "c", 2  # the client whose reply is lost, and when


def _losing(times: int) -> Callable[[ToySite], Link]:
    """Lose a reply `times` times in a run; the link is made anew for each round."""
    left = Losing(Local([]), LOST, ROUND, times)

    def through(site: ToySite) -> Link:
        left.link = Local([site])
        return left

    return through


def check_dropped(make: MakeAlgorithm) -> None:
    """Go on without a client whose reply is lost as if it had not been asked, and with its older memory afterwards."""
    everyone = {"toy": toys.toy(per_round=5)}

    def without(pool: Pool) -> list[str]:
        return [name for name in pool.names if (name, pool.round) != (LOST, ROUND)]

    dropped = _outcome(make, **everyone, through=_losing(9), how=lambda f: replace(f, policy=Policy("drop")))
    never = _outcome(make, **everyone, how=lambda f: replace(f, sampler=Sampler(without)))
    require(dropped == never, "a client that was dropped leaves something behind; use the memory that is given")
    whole = make().sends and not make().combine  # a robust rule may leave the client out by itself
    require(not whole or dropped != _outcome(make, **everyone), "a reply that is lost changes nothing")


def check_retried(make: MakeAlgorithm) -> None:
    """Give the same bits where a client had to be asked once more."""
    everyone = {"toy": toys.toy(per_round=5)}
    again = _outcome(make, **everyone, through=_losing(1), how=lambda f: replace(f, policy=Policy("retry")))
    require(again == _outcome(make, **everyone), "asking a client once more changes the result")


def check_inputs(make: MakeAlgorithm) -> None:
    """Leave every input as it was."""

    def watched() -> Algorithm:
        algorithm = make()
        parts: dict[str, Any] = {}
        for name in ("init", "client", "server", "keep"):
            parts[name] = guarded(name, getattr(algorithm, name))
        return replace(algorithm, **parts)

    _outcome(watched)


def check_state(make: MakeAlgorithm) -> None:
    """Keep every tensor float32 and finite; send float32 updates."""

    def watched() -> Algorithm:
        algorithm = make()

        def client(*given: Any) -> tuple[State, State]:
            update, kept = algorithm.client(*given)
            require_float32("an update", update)
            require_float32("what a client keeps", kept)
            return update, kept

        return replace(algorithm, client=client)

    with running("the algorithm fails on the toy federation"):
        servers = toys.play(watched, MEAN, toy=toys.toy()).servers
    for server in servers:
        require_float32("the state", server.state)
        require(not (bad := trees.not_finite(server.state)), f"the state holds a NaN or an infinity in {bad}")


def check_shapes(make: MakeAlgorithm) -> None:
    """Keep every tensor of the shape that `init` gave it. Algorithms whose low-rank factors grow may waive it."""
    with running("the algorithm fails on the toy federation"):
        servers = toys.play(make, MEAN, toy=toys.toy()).servers
    for server in servers:
        changed = trees.difference(server.state, servers[0].state)
        require(not changed, f"after round {server.round} the state is not as `init` made it: {changed}")


def check_sends(make: MakeAlgorithm) -> None:
    """Name in `sends` parts that exist, and use no other part at a client."""
    algorithm = make()
    unknown = set(algorithm.sends) - set(algorithm.init(toys.adapter()))
    require(not unknown, f"`sends` names {', '.join(sorted(unknown))}, which `init` does not make")

    class Sent(dict[str, Any]):
        def __missing__(self, part: str) -> Any:
            raise AssertionError(f"`client` reads the part `{part}`, which `sends` does not name")

    def client(work: Any, received: State, kept: State) -> tuple[State, State]:
        return algorithm.client(work, Sent(received), kept)

    _outcome(lambda: replace(algorithm, client=client))


def check_stale(make: MakeAlgorithm) -> None:
    """Send nothing but parts of the state, if the algorithm says that a stale update is as good as a fresh one."""
    algorithm = make()
    if not algorithm.stale or algorithm.combine:
        return
    state = algorithm.init(toys.adapter())
    sent = {part: state[part] for part in algorithm.sends}
    with running("the algorithm fails on the toy federation"):
        update = template(algorithm, sent, toys.adapter(), 1)
    for part, tree in update.items():
        different = part not in sent or trees.difference({part: tree}, {part: sent[part]})
        require(
            not different, f"`stale` is declared, and the update's part `{part}` is no part of the state that is sent"
        )


def check_reach(make: MakeAlgorithm) -> None:
    """Move the adapter in a round no further than `reach` times the longest update, where that is said."""
    if not (reach := make().reach) or make().combine:
        return
    steps = [("delta", delta()), ("clip", clip(CLIPPED)), *MEAN]
    with running("the algorithm fails on the toy federation"):
        states = [server.state["adapter"] for server in toys.play(make, steps, toy=toys.toy()).servers]
    for number, (before, after) in enumerate(pairwise(states), start=1):
        length = trees.norm(trees.subtract(after, before))
        told = f"round {number} moves the adapter by {length:.4g}, and `reach` says {reach * CLIPPED:.4g} at most"
        require(length <= reach * CLIPPED * (1 + 1e-4), told)


def check_learning(make: MakeAlgorithm) -> None:
    """Come nearer to the optimum: of all clients together, or of each where adapters are personal."""
    toy = toys.toy(per_round=5)
    total = sum(client.examples for client in toy.clients.values())
    shares = {name: client.examples / total for name, client in toy.clients.items()}
    mean = {
        part: sum((toy.clients[name].target[part] * share for name, share in shares.items()), torch.zeros(()))
        for part in toys.EFFECTIVE
    }
    with running("the algorithm fails on the toy federation"):
        played = toys.play(make, MEAN, 40, toy=toy)
    for name, client in toy.clients.items():
        goal = client if make().personal else replace(client, target=mean)
        before, after = goal.loss(toys.adapter()), goal.loss(played.used[name])
        told = f"40 rounds take client {name} from a loss of {before:.3g} to {after:.3g}"
        require(after < 0.9 * before, told)


def check_weights(make: MakeAlgorithm) -> None:
    """Count a client with n examples as n clients with one each. Personal algorithms may waive it."""
    sizes = {"a": 3, "b": 1}
    one = Toy({name: toys.client(name, size) for name, size in sizes.items()}, 2)
    copies = {f"{name}-{i}": toys.client(name) for name, size in sizes.items() for i in range(size)}
    results = []
    for toy in (one, Toy(copies, 4)):
        with running("the algorithm fails on the toy federation"):
            results.append(toys.effective(toys.play(make, MEAN, toy=toy).used[next(iter(toy.clients))]))
    for name, value in results[0].items():
        near = torch.allclose(value, results[1][name], rtol=1e-4, atol=1e-5)
        require(near, f"a client with 3 examples does not count as 3 clients with one each ({name} differs)")


ALGORITHM = (
    check_reply_order,
    check_block_size,
    check_resume,
    check_lost_replies,
    check_link_parity,
    check_dropped,
    check_retried,
    check_inputs,
    check_state,
    check_shapes,
    check_sends,
    check_stale,
    check_reach,
    check_learning,
    check_weights,
)


def check_algorithm(make: MakeAlgorithm, waive: Collection[str] = ()) -> None:
    """Run all checks of an algorithm."""
    run_all(ALGORITHM, {*waive, *(("check_weights",) if make().personal else ())}, make)
