"""Blocks end where clients end one by one: some of benchmarks/engine_parity.py, and controls that must differ."""

import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.adapters.lora import lora
from weft.core import low_rank
from weft.site.cohort import Cohort
from weft.testing import families
from weft.testing.families import double, equipped

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "engine_parity.py"))
case_of: Any = SCRIPT["case_of"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls a name that transformers renames
        yield


@pytest.mark.parametrize(
    ("adapter", "task", "family", "mode"),
    [
        ("lora", "causal_lm", "llama", "packed"),
        ("dora", "causal_lm", "gpt2", "packed"),
        ("lora, dropout", "preference", "qwen2", "packed"),
        ("ia3", "classification", "bloom", "padded"),
        ("lora", "classification", "bert", "packed"),
        ("lora", "seq2seq", "t5", "padded"),
        ("prefix", "causal_lm", "bloom", "padded"),
        ("bitfit", "image_classification", "vit", "padded"),
    ],
)
def test_blocks_end_where_their_clients_end_alone(adapter: str, task: str, family: str, mode: str) -> None:
    """Ten AdamW steps at most, ragged lengths, unequal steps, one to four ranks in a block, in float64."""
    case = case_of(adapter, task, family)
    assert case.mode == mode
    assert SCRIPT["compare"](case, 4, (2, 4)) < 1e-9


def test_in_float32_the_difference_is_rounding() -> None:
    """Wanted: 1e-4 of lr x steps, here 1e-3 x 10."""
    assert SCRIPT["compare"](case_of("lora", "causal_lm", "llama", wide=False), 4, (4,)) < 1e-4 * 1e-3 * 10


@pytest.mark.parametrize(("adapter", "task"), [("lora", "causal_lm"), ("dora", "causal_lm"), ("full", "preference")])
@pytest.mark.usefixtures("_whole_vectors")
def test_a_packed_block_gives_each_client_the_bits_that_it_has_alone(adapter: str, task: str) -> None:
    """In float32; the control, one clipping norm for the block, is below."""
    if not products_know_no_company():
        pytest.skip("this processor's products of matrices depend on how many rows there are")
    case = case_of(adapter, task, "llama", wide=False)
    assert case.mode == "packed"
    assert SCRIPT["compare"](case, 4, (2, 4), plain=False) == 0


def test_a_padded_block_of_pictures_and_captions_gives_the_bits_too() -> None:
    """In float32; captions are of unlike length, and a client's last mini-batch has fewer rows than the others'."""
    if not products_know_no_company():
        pytest.skip("this processor's products of matrices depend on how many rows there are")
    case = case_of("lora", "image_text", "clip", wide=False)
    assert case.mode == "padded"
    assert SCRIPT["compare"](case, 4, (2, 4), plain=False) == 0


@pytest.fixture
def _whole_vectors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(families.OWN, "llama", families.OWN["llama"] | SCRIPT["WHOLE"])
    families.tiny.cache_clear()
    yield
    families.tiny.cache_clear()


def products_know_no_company() -> bool:
    """Tell whether a row of a product is the same to the bit whatever other rows there are."""
    draw = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(96, 16, generator=draw), torch.randn(24, 16, generator=draw)
    whole = rows @ weight.T
    return all(torch.equal(whole[at : at + n], rows[at : at + n] @ weight.T) for n in (8, 17, 40) for at in (0, 5, 31))


@pytest.mark.parametrize("bug", ["global_clip", "padded_mean"])
def test_a_planted_bug_shows(bug: str) -> None:
    assert SCRIPT[bug](case_of("lora", "causal_lm", "llama")) > 1e-4


def test_a_table_of_positions_that_rows_share_shows() -> None:
    """DeBERTa: the row guard refuses it, and without the guard a gradient is wrong."""
    said, wrong = SCRIPT["shared_positions"]()
    assert "reaches a trained layer" in said
    assert wrong > 1e-3


def test_a_client_of_fewer_ranks_ends_where_a_smaller_adapter_ends() -> None:
    """Ranks 1 to 4 of 4 in one block, against models of their own with so many ranks; the scale stays, 16 / 4."""
    case = case_of("lora", "causal_lm", "llama")
    together, start = case.trained(4, 4), case.starts(4)
    for row, (client, examples) in enumerate(case.clients(4).items()):
        rank = row + 1
        own = double(equipped(lora(rank=rank, alpha=4 * rank, targets="all-linear"), case.cohort.task, "llama"))
        engine = Cohort(own, case.cohort.task, case.cohort.recipe, 3, "single", own.lift)

        def first(tensors: dict[str, torch.Tensor], row: int = row, rank: int = rank) -> dict[str, torch.Tensor]:
            return {n: t[row : row + 1].narrow(low_rank.axis(n) or 0, 0, rank) for n, t in tensors.items()}

        with SCRIPT["unrounded"]():
            alone = engine.train(1, {client: examples}, first(start), {}, None).params
        assert SCRIPT["apart"](alone, first(together)) < 1e-9
