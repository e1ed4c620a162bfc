"""The types that carry a federation; the whole system passes these and nothing else."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, Union

from torch import Tensor, nn

if TYPE_CHECKING:
    from weft.core.ring import RingSum
    from weft.core.sums import Sum

Tensors = dict[str, Tensor]
"""Every trainable parameter by its name, in name order, float32, heads included."""

State = dict[str, Tensors]
"""Named parts, each a Tensors: {"adapter": {...}, "momentum": {...}}. One safetensors file."""

Metrics = dict[str, float]
"""Named sums over examples, never means: adding the sums of two clients measures both together."""

Products = dict[str, tuple[Tensor, Tensor]]
"""Module name -> (U, V) with the effective weight change dW = U V; U is (out, rank) and carries the scale."""

Total = Union["Sum", "RingSum", State]
"""What travels up the pipeline: an integer sum until `weigh` or `ring` divides it, a float state from there on."""

Gradient = Callable[[Tensors, Tensors, Tensor], Tensors]
"""(grads, params, rows) -> corrected grads, each (len(rows), *shape).
rows: where along the block's client axis these clients stand: those that have finished are left out, and the order
is the engine's. A tensor of one row a client is brought in line by `tensor[rows]`.
"""


class Work(Protocol):
    """What an algorithm's client half may ask of the site that trains a block of clients.
    Every tensor that `train` takes or gives has a leading client axis: (clients, *shape).
    """

    @property
    def clients(self) -> tuple[str, ...]:
        """Return the names along the client axis."""

    @property
    def examples(self) -> Tensor:
        """Return the training examples of each client, (clients,)."""

    @property
    def steps(self) -> Tensor:
        """Return the optimizer steps of each client in this round, (clients,)."""

    @property
    def ranks(self) -> Tensor:
        """Return how many ranks of a low-rank adapter each client trains, (clients,); 0: all."""

    @property
    def initial(self) -> Tensors:
        """Return the first adapter, which every site computes from the public seed, once a client."""

    @property
    def round(self) -> int:
        """Return the number of the round, from 1."""

    @property
    def lr(self) -> float:
        """Return the job's peak learning rate."""

    @property
    def momentum(self) -> float:
        """Return the momentum of the job's sgd."""

    def draw(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers, (clients, *shape): for each client and round others, again the same."""

    def train(self, start: Tensors, gradient: "Gradient | None" = None) -> Tensors:
        """Train from `start` on each client's own data; `gradient` may correct each step."""

    def loss(self, adapter: Tensors) -> Tensor:
        """Return each client's mean loss over all its training data, (clients,), without training."""


@dataclass(frozen=True)
class Tally:
    """Who replied in a round, and with what weight; the weights are those that the sum was taken with."""

    round: int
    weights: Mapping[str, int]
    examples: Mapping[str, int]
    population: int = 0
    """Clients of the federation, asked or not."""
    sent: State = field(default_factory=dict)
    """What the clients started from, as the server has it: before it was coded for the way down."""
    seed: int = 0
    """The job's public seed."""
    secret: bytes = b""
    """What privacy noise is drawn from; never sent, and no part of the job."""
    wire: "Wire" = field(default_factory=lambda: Wire())
    """What was known of the updates when they left their clients."""
    form: State = field(default_factory=dict)
    """Names, shapes and types of what a step was given at a client, where updates are encoded; values mean nothing."""

    @property
    def total(self) -> int:
        """Return the sum of the weights."""
        return sum(self.weights.values())


@dataclass(frozen=True)
class At:
    """Where a pipeline step stands: the address of its random draws, and what this client started from."""

    seed: int
    round: int
    client: str
    received: State = field(default_factory=dict)
    """What this client started from, as it received it: the algorithm's `origin`."""
    cohort: tuple[str, ...] = ()
    """All clients that were asked in this round."""
    wire: "Wire" = field(default_factory=lambda: Wire())  # what the whole pipeline leaves
    secret: bytes = b""  # the client's own, which noise is drawn from
    hide: Callable[[Tensor], Tensor] | None = None  # adds the client's masks of this round to a ring vector
    form: State = field(default_factory=dict)
    """`arrive`: names, shapes and types of what this step was given at the client; values mean nothing."""


@dataclass(frozen=True)
class Parcel:
    """What travels down the pipeline of one client: its update and the integer that it counts for in the sum."""

    update: State
    examples: int
    weight: int = 1
    kept: State = field(default_factory=dict)
    """What this step kept at this client, such as the residual of error feedback; the step replaces it."""
    metrics: Metrics = field(default_factory=dict)  # what the client tells of its training


@dataclass(frozen=True)
class Wire:
    """What is known of a parcel before anything is trained; each transform checks and changes it."""

    weighted: bool = False
    """The parcel carries its weight; the server half divides the sum by all weights."""
    uniform: bool = False
    """Every client's weight is 1."""
    delta: bool = False
    """The update is the difference to what the client was sent."""
    norm: float | None = None
    """A bound on the joint L2 norm of what one client adds, before its weight."""
    noise: float = 0.0
    colluders: int = 0
    """Noise of the sum of all clients' parcels: its standard deviation over `norm`; clients whose part may be known."""
    encoded: str = ""
    """The transform that encoded the update: what follows sees codes and no numbers."""
    ring: bool = False
    """The update is one vector of integers in a ring."""
    hidden: bool = False
    """The server sees sums only."""
    heaviest: int | None = None
    """The most that one client counts for in the sum."""
    length: float | None = None
    """The length in use of a clip that adapts; None: it does not."""
    spread: float = 0.0
    """The standard deviation of the noise on how many updates such a clip left as they were."""
    down: bool = False
    """The parcel goes from the server to the clients: it is a state and no update, and nothing is summed."""


@dataclass(frozen=True)
class Adapts:
    """How the length that a step allows follows the updates from round to round."""

    at: Callable[[float], "Transform"]
    """The same step at another length."""
    after: Callable[[int, Tally], tuple[float, float]]
    """(clients whose update was short enough, tally) -> (their noisy share, the next round's length)."""


@dataclass(frozen=True)
class Transform:
    """One step between a client's update and the server.

    `client` runs at the client, in order; `arrive` undoes an encoding of one reply before it enters the sum, and
    `server` runs on the sum: both in reverse order.
    """

    check: Callable[[Wire], Wire] = lambda wire: wire
    client: Callable[[At, Parcel], Parcel] = lambda at, parcel: parcel
    arrive: Callable[[At, State], State] = lambda at, update: update
    server: Callable[[Total, Tally], Total] = lambda total, tally: total
    varies: bool = False
    """How long the client half's tensors are depends on their values."""
    remembers: bool = False
    """The client half keeps something between rounds in the parcel's `kept`; before the first it finds nothing."""
    adapts: Adapts | None = None
    """The step's length is the server's to say, in each order."""


def _keep_nothing(adapter: Tensors) -> State:
    return {}


def _origin(received: State, initial: Tensors) -> State:
    return received


def whole(update: State) -> State:
    """Return all of an update."""
    return update


def _serve_global(state: State, kept: State, initial: Tensors) -> Tensors:
    return state["adapter"]


@dataclass(frozen=True)
class Facts:
    """What is known of a job before anything is loaded; an algorithm refuses what it is not defined for."""

    clients: int
    per_round: int
    optimizer: str
    weight_decay: float
    momentum: float
    adapter: str
    low_rank: bool
    """The adapter is a pair of low-rank factors (lora)."""
    mixed_ranks: bool
    pipeline: tuple[str, ...]
    """Names of the transforms."""
    uniform: bool = False
    """Every client counts once in the mean."""
    lr: float = 0.0
    schedule: str = "constant"
    warmup: float = 0.0
    moments: str = "reset"
    even: bool = True
    """Every client is asked equally often."""
    fixed: bool = True
    """Every round asks the same number of clients."""
    hidden: bool = False
    """The server sees sums only."""
    noise: float = 0.0
    """The noise of the pipeline, as in `Wire`."""
    adapts: bool = False
    """The length of clip follows the updates."""
    names: tuple[str, ...] = ()
    """Of the clients."""
    dp: bool = False


@dataclass(frozen=True)
class Algorithm:
    """A federated algorithm as pure functions of states; tensors inside `client` have a leading client axis."""

    client: Callable[[Work, State, State], tuple[State, State]]
    """(work, received, kept) -> (update, kept): one round at a block of clients."""
    server: Callable[[State, State, Tally], State]
    """(state, update, tally) -> state: the step after the sum."""
    init: Callable[[Tensors], State] = lambda adapter: {"adapter": adapter}
    """The first state, from the first adapter."""
    keep: Callable[[Tensors], State] = _keep_nothing
    """What a client keeps before its first round."""
    serve: Callable[[State, State, Tensors], Tensors] = _serve_global
    """(state, kept, first adapter) -> the adapter that is used and saved; low-rank factors may have any rank."""
    origin: Callable[[State, Tensors], State] = _origin
    """(received, first adapter) -> what the tensors of an update with the same part and name were trained from; all
    others are differences already."""
    reach: float | None = None
    """How many times the mean of the updates the server moves the adapter; None: no such number."""
    sends: tuple[str, ...] = ("adapter",)
    """The parts of the state that leave the server."""
    serves: tuple[str, ...] = ()
    """The parts that `serve` reads, which are sent to measure them; none: those of `sends`."""
    combine: "Callable[[Sequence[Reply], State, Tally], State] | None" = None
    """(replies in name order, state, tally) -> update; None: the weighted mean is enough, so secure aggregation is
    possible and the server holds one sum instead of all replies."""
    effective: Callable[[State, State, Tensors], Tensors] | None = None
    """(received, update, first adapter) -> the adapter that a client ended with; None: `serve` of its update."""
    check: Callable[[Facts], None] = lambda facts: None
    """Raise JobError for a job that the algorithm is not defined for, with the reason."""
    exports: Callable[[State, Tensors], dict[str, Tensors]] = lambda state, initial: {}
    """(state, first adapter) -> adapters by name that the run folder holds beside the one that `serve` gives."""
    cut: Callable[[State], State] = whole
    """One client's update -> what of it travels; its shapes may differ from client to client where `combine` is set."""
    stale: bool = False
    """Its update is parts of the state alone, so one that began at an older state still says where to go."""
    personal: bool = False
    """Each client uses an adapter of its own: `serve` reads what the client kept."""


def _save_as_is(adapter: Tensors, initial: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    return adapter, config


@dataclass(frozen=True)
class Adapter:
    """A PEFT method: how it is put on a base model, and what averaging it means."""

    attach: Callable[[nn.Module, str, int], nn.Module]
    """(base model, peft task type, seed) -> the peft model, everything frozen but the adapter and the head."""
    products: Callable[[Tensors], Products] | None = None
    """The effective weight changes, where the method has them."""
    saved: Callable[[Tensors, Tensors, dict[str, Any]], tuple[Tensors, dict[str, Any]]] = _save_as_is
    """(adapter, first adapter, peft config) -> what the adapter's folder holds, from tensors alone."""
    mergeable: bool = True
    virtual: bool = False
    """It puts virtual tokens into a text; a task that gives the model pictures refuses it."""
    notice: Callable[[Any], str | None] = lambda base: None
    """(base model) -> what a user should know of the adapter on this family, in one sentence."""


@dataclass(frozen=True)
class Order:
    """What the server asks of a site for some of its clients."""

    kind: Literal["train", "evaluate", "untrained"]
    """`untrained` measures the base as it is."""
    round: int
    clients: tuple[str, ...]
    state: State
    since: Mapping[str, int] = field(default_factory=dict)
    """Client -> the last round whose reply was counted: which of its own memories is valid (0: none)."""
    metrics: tuple[str, ...] = ()
    cohort: tuple[str, ...] = ()
    """All clients of the round; those of this order are some of them where it is repeated for the lost ones."""
    secure: Mapping[str, bytes] = field(default_factory=dict)  # client -> what its masks need; its site needs it alone
    length: float | None = None  # of a clip that adapts


@dataclass(frozen=True)
class Reply:
    """One client's answer to an order; `failure` says in one sentence why there is no update."""

    client: str
    round: int
    update: State = field(default_factory=dict)
    weight: int = 1
    examples: int = 0
    metrics: Metrics = field(default_factory=dict)
    measured: Mapping[str, Metrics] = field(default_factory=dict)
    """Evaluation: test group -> metric sums."""
    failure: str | None = None
    not_finite: bool = False
    """The failure is a NaN or an infinity: the same client would meet it again."""
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class Question:
    """Anything a server asks a site that is not a round: `describe` before the first, `generate` after the last."""

    kind: str
    body: Mapping[str, Any] = field(default_factory=dict)


class Site(Protocol):
    """A machine with one resident base model and one or more clients."""

    def handle(self, order: Order) -> Iterator[Reply]:
        """Train or evaluate the clients named in the order, one reply each, in any order."""

    def answer(self, question: Question) -> Any:
        """Answer a question; the types are those of the question's kind."""


class Link(Protocol):
    """The way between a server and its sites."""

    def exchange(self, order: Order) -> Iterable[Reply]:
        """Send an order, give back the replies in the order in which they arrive."""

    def ask(self, question: Question) -> Sequence[Any]:
        """Ask every site, give back their answers."""


@dataclass(frozen=True)
class Server:
    """All that the server knows between two rounds: all that a checkpoint holds."""

    state: State
    round: int = 0
    since: Mapping[str, int] = field(default_factory=dict)
    beside: State = field(default_factory=dict)
    """What a sampler or a clock keeps between rounds; no algorithm sees it, and nothing of it is sent."""
