"""The Hugging Face hub: whether it answers, asked before its client tries six times in half a minute."""

from __future__ import annotations

from pathlib import Path

from vardistill.errors import first_line

PATIENCE = 10.0
"""Seconds that the hub has to answer."""


def require_answer(repository: str, kind: str = "model") -> None:
    """Raise ConnectionError where the hub does not answer, and nothing of the repository was downloaded before.

    Args:
        repository: its id.
        kind: model or dataset.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.file_download import repo_folder_name

    kept = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type=kind))
    if constants.HF_HUB_OFFLINE or kept.is_dir():  # then the client asks nothing, or need not
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # each client of HTTP has its own
        raise ConnectionError(f"the Hugging Face hub does not answer: {first_line(error)}") from error
