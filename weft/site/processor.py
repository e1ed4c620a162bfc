"""What reads records with pictures: the base's image processor, with its tokenizer beside it where there is text."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.core.errors import JobError
from weft.data.pictures import decoded, pillow

FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Processor:
    """Stands where a tokenizer stands in tasks without pictures."""

    images: Any
    """transformers' image processor, the one that works with Pillow and not with torchvision."""
    tokenizer: Any = None
    """None where the task reads no text."""

    @property
    def pad_token_id(self) -> int:
        """Return the id that texts are padded with."""
        return self.tokenizer.pad_token_id if self.tokenizer is not None else 0

    def pixels(self, path: str) -> Tensor:
        """Return a picture as the model takes it, (channels, height, width) float32."""
        return self._made(decoded(Path(path)))

    def _made(self, image: Any) -> Tensor:
        made: Tensor = self.images(images=image, return_tensors="pt")["pixel_values"][0]
        return made.float().contiguous()

    def size(self) -> tuple[int, int]:
        """Return height and width of what every picture becomes; raise JobError where they differ."""
        wide, high = (self._made(pillow().new("RGB", size, "gray")).shape[-2:] for size in ((90, 40), (30, 70)))
        if wide != high:
            raise JobError(
                "model.name: its image processor leaves pictures of unlike sizes as they are; "
                "set do_resize and size in its preprocessor_config.json"
            )
        return int(wide[0]), int(wide[1])

    def get_vocab(self) -> dict[str, int]:
        """Return the tokenizer's vocabulary; none without a tokenizer."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab() if self.tokenizer is not None else {}
        return vocabulary

    def settings(self) -> str:
        """Return what decides the pixels, as text: two processors that differ in it are not the same."""
        return json.dumps(self.images.to_dict(), sort_keys=True, default=str)

    def save_pretrained(self, folder: Path) -> None:
        """Write the files that transformers loads them from."""
        self.images.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def image_processor(name: str, path: str, revision: str | None) -> Any:
    """Load the image processor of a base; raise JobError with what is wrong in one sentence."""
    import transformers

    pillow()
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            path, revision=revision or "main", backend="pil", trust_remote_code=False
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise JobError(f"model.name: the image processor of {name} cannot be read: {reason}") from error


def check_size(name: str, processor: Processor, config: Any) -> None:
    """Refuse an image processor that makes pictures of another size than the model takes."""
    wanted = getattr(getattr(config, "vision_config", config), "image_size", None)
    if wanted is None:
        return
    height, width = (wanted, wanted) if isinstance(wanted, int) else tuple(wanted)
    if processor.size() != (height, width):
        made = " x ".join(map(str, processor.size()))
        raise JobError(
            f"model.name: the image processor of {name} makes pictures of {made} pixels and its config.json asks for "
            f"{height} x {width}; they do not belong together"
        )
