"""Pictures: files beside the data file, named by its records; found, bounded and decoded, and never outside.

Decoders read what strangers made: only four formats are tried, and the size is known before a pixel is.
No error of this file holds the name of a picture: it may be private, as text is.
"""

import os
import stat
from io import BytesIO
from pathlib import Path
from typing import Any

from weft.core.errors import JobError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MOST_BYTES = 50_000_000  # of a file
MOST_PIXELS = 50_000_000  # 150 MB once decoded
DEEP = ("I", "F")  # modes, and beginnings of modes, with more than 8 bits a channel


def pillow() -> Any:
    """Return Pillow's module Image; raise JobError where it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise JobError("task: pictures need Pillow; install it: pip install 'weft-fl[images]'") from None
    return Image


def located(folder: Path, name: str) -> Path:
    """Return the whole path of a picture that a record in `folder` names; raise JobError with the reason alone."""
    try:
        path, root = (folder / name).resolve(), folder.resolve()
        inside = not Path(name).is_absolute() and path.is_relative_to(root)
        found = inside and stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError, RuntimeError):  # no such file, a name no file can have, links in a circle
        inside, found = True, False
    if not inside:
        raise JobError("the column 'image' leads out of the data file's folder")
    if not found:
        raise JobError("the column 'image' names no file beside the data file")
    return path


def decoded(path: Path) -> Any:
    """Return a picture as RGB, upright, transparent parts white; raise JobError with the reason alone."""
    import warnings

    image_module = pillow()
    content = _content(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what is refused here by its size, and of odd metadata
        try:
            with image_module.open(BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise JobError(f"the picture has more than {MOST_PIXELS:,} pixels")
                if image.mode.startswith(DEEP):
                    raise JobError("the picture has more than 8 bits a channel; save it with 8")
                return _upright(image)
        except JobError:
            raise
        except image_module.DecompressionBombError:
            raise JobError(f"the picture has more than {MOST_PIXELS:,} pixels") from None
        except image_module.UnidentifiedImageError:
            raise JobError(f"the picture is damaged or none of {', '.join(FORMATS)}") from None
        except Exception:  # decoders of strangers' bytes fail in any way
            raise JobError("the picture is damaged; copy it again") from None


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            content = handle.read(MOST_BYTES + 1)
    except OSError as error:
        raise JobError(f"the picture cannot be read ({error.strerror})") from None
    if len(content) > MOST_BYTES:
        raise JobError(f"the picture's file has more than {MOST_BYTES:,} bytes")
    return content


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    whole = ImageOps.exif_transpose(image)  # decodes every pixel
    if whole.mode in ("RGBA", "LA", "PA") or "transparency" in whole.info:
        whole = whole.convert("RGBA")
        white = pillow().new("RGBA", whole.size, "white")
        return pillow().alpha_composite(white, whole).convert("RGB")
    return whole.convert("RGB")
