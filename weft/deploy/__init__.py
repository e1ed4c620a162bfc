"""The same job between real sites: keys, certificates, the coordinator, the sites and what they allow."""

from importlib.util import find_spec

from weft.core.errors import JobError


def needs_flower() -> None:
    """Raise JobError where Flower, which carries the messages, is not installed; keep it from calling home."""
    import os

    if find_spec("flwr") is None:
        raise JobError('real sites need Flower, which is not installed: pip install "weft-fl[deploy]"')
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
