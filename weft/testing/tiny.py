"""A tiny model, a tokenizer of characters, pictures and some records, made in memory: no file, no download."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.core import keys
from weft.site.processor import Processor

RECORDS: list[dict[str, Any]] = [
    {
        "question": f"what is {thing} {place}",
        "answer": f"a {thing} of {place * 7} grams" + " and more" * (place % 3),
        "prompt": f"how heavy is {thing} {place}",
        "chosen": f"{thing} weighs {place * 7} grams" + " or more" * (place % 2),
        "rejected": "heavy" + " indeed" * (place % 3),
        "text": f"the {thing} costs {place}" + " coins" * (place % 4),
        "label": thing,
        "source": f"site {place % 3}",
        "image": f"{thing} {place}",
        "caption": f"{thing} number {place}" + " again" * (place % 3),
    }
    for place in range(6)
    for thing in ("card", "rain", "bread", "engine")
]
"""Records with the columns that Weft's own tasks and splits ask for."""


def tokenizer(chat_template: str | None = None, *, bos: bool = False, captions: bool = False) -> Any:
    """Return a tokenizer of one token a character: <pad> 0, <s> 1, </s> 2, <unk> 3, then ASCII by code.

    captions: every text ends in a token of its own, END, as CLIP's do.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = ["\n", *map(chr, range(32, 127))]
    last = ["<end>"] if captions else []
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(special + letters + last)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    if bos:
        words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    if captions:
        words.post_processor = processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", END)])
        special[2] = "<end>"
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    made = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    made.chat_template = chat_template
    return made


SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


SIDE = 8  # pixels
END = 100  # the token that ends a caption; the last of the vocabulary


class Pictures(Processor):
    """A processor that draws a picture from its name instead of reading a file."""

    def pixels(self, path: str) -> Tensor:
        """Return normal numbers, always the same for a name, (3, SIDE, SIDE)."""
        return torch.randn(3, SIDE, SIDE, generator=keys.generator(0, "picture", path))


def reader(reads: Sequence[str]) -> Any:
    """Return what reads the records of a task: a tokenizer, or a processor where they hold pictures."""
    if "images" not in reads:
        return tokenizer()
    return Pictures(None, tokenizer(captions=True) if "text" in reads else None)


def model(auto: str = "AutoModelForCausalLM", *, labels: int = 2) -> nn.Module:
    """Return a Llama, or a T5 for an encoder-decoder, of two layers; random weights, always the same, frozen."""
    import transformers

    if auto == "AutoModelForSeq2SeqLM":
        config: Any = transformers.T5Config(
            **SIZES, d_ff=24, d_kv=8, num_layers=2, decoder_start_token_id=0, initializer_factor=1.0, dropout_rate=0.0
        )
    else:
        config = transformers.LlamaConfig(
            **SIZES,
            intermediate_size=24,
            num_hidden_layers=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            initializer_range=0.3,
            num_labels=labels,
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net: nn.Module = getattr(transformers, auto).from_config(config)
    return net.requires_grad_(False).eval()
