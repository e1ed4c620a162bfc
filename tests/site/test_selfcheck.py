"""The numeric check before round 1 and the models that it must refuse to pack or to lift."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from weft import Job
from weft.core.task import Encoded
from weft.core.types import Adapter
from weft.plugins import build
from weft.prepare import prepare, set_up
from weft.site.below import Below, Kept
from weft.site.cohort import Cohort
from weft.site.lift import Lift
from weft.site.model import Loaded, places_of
from weft.site.selfcheck import choose

FAMILIES: dict[str, Any] = {
    "llama": transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ),
    "qwen3": transformers.Qwen3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8,
    ),
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "opt": transformers.OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=128,
    ),
    "bloom": transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4),
    "mistral": transformers.MistralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=16,
    ),
}  # fmt: skip


def cohort_of(job: Job, config: Any) -> tuple[Cohort, Encoded]:
    """Return an engine over a random model of a family, with the small job's records."""
    prepared = prepare(job)
    bench = set_up(prepared)
    config.vocab_size, config.pad_token_id = 512, 0
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(config)
    net.requires_grad_(False)
    adapter: Adapter = build(job.adapter, "adapter")
    adapted = adapter.attach(net, "CAUSAL_LM", 0).eval()
    places, initial = places_of(adapted)
    loaded = Loaded(
        adapted, bench.loaded.tokenizer, torch.device("cpu"), places, initial, Lift(adapted, places), Below((), Kept(0))
    )
    return Cohort(loaded, prepared.task, prepared.plan.recipe, 0, "single", loaded.lift), bench.train["site-0"]


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("llama", "packed"),
        ("qwen3", "packed"),
        ("gpt2", "packed"),
        ("opt", "packed"),
        ("bloom", "padded"),  # never asks the attention interface: packing would be silently wrong
        ("mistral", "padded"),  # a sliding window
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_mode_of_each_family(values: dict[str, Any], family: str, mode: str) -> None:
    values["adapter"] = {"lora": {"rank": 2, "targets": "all-linear"}}
    cohort, encoded = cohort_of(Job(**values), FAMILIES[family])
    chosen, _ = choose(cohort, encoded.examples)
    assert chosen == mode


def test_a_layer_that_couples_clients_is_found(job: Job) -> None:
    """Negative control: a norm over the rows of all clients; no block can be right, and the site says so."""
    bench = set_up(prepare(job))
    engine = Cohort(bench.loaded, bench.prepared.task, bench.prepared.plan.recipe, 0, "single", bench.loaded.lift)
    rows = bench.train["site-0"].examples
    assert choose(engine, rows) == ("packed", None)
    layer: nn.Module = bench.loaded.net.get_base_model().model.layers[2]
    hook = layer.register_forward_hook(lambda module, args, out: out - out.mean(dim=(0, 1), keepdim=True))
    mode, notice = choose(engine, rows)
    hook.remove()
    assert mode == "single"
    assert notice is not None
    assert notice.startswith("clients are trained one by one, since packed blocks: a gradient differs by")


def test_a_table_shared_by_all_rows_is_refused(job: Job) -> None:
    """A trained layer that reads something else than the block's rows raises instead of cutting it by client."""
    bench = set_up(prepare(job))
    lanes = bench.loaded.lift.lanes
    lanes.clients, lanes.rows = 2, 4
    assert len(lanes.split(torch.zeros(4, 7, 3))) == 2
    with pytest.raises(NotImplementedError, match="reaches a trained layer"):
        lanes.split(torch.zeros(512, 3))
