"""A folder for the Hugging Face hub, built here; pushed only when asked."""
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is public, and not in its __all__

from timm_multilabel.errors import UserError
from timm_multilabel.exports import timm_folder, weights
from timm_multilabel.exports.card import model_card
from timm_multilabel.exports.exportable import Exportable
from timm_multilabel.exports.formats import put_in_place, write_compared
from timm_multilabel.files import write_atomic


def hub_files(has_heads: bool) -> list[str]:
    """The files of a folder."""
    return ['README.md', *timm_folder.FILES, *(weights.FILES if has_heads else ())]


def build_folder(exportable: Exportable, folder: Path, repo: str | None) -> float:
    """Write model card, weights and configuration, those of timm for the backbone and ours for all.

    Args:
        exportable: The model.
        folder: Where; made where there is none.
        repo: The name of its repository, for the card.

    Returns:
        The largest difference of what was loaded again to the checkpoint.

    Raises:
        UserError: As `write_compared`, and nothing is written then.
    """
    has_heads = bool(exportable.model.heads)
    with put_in_place(folder, hub_files(has_heads)) as aside:
        difference = write_compared(exportable, timm_folder, aside)
        if has_heads:
            difference = max(difference, write_compared(exportable, weights, aside))
        write_atomic(aside / 'README.md', model_card(exportable, repo))
    return difference


def check_repo(repo: str) -> None:
    """Raise UserError unless a name is one that the hub takes."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f'--push {repo}: is no name of a repository, such as USER/NAME') from error


def push_folder(folder: Path, repo: str, has_heads: bool) -> str:
    """Upload the files of a folder that `build_folder` wrote; a repository that is made for them is private.

    Returns:
        Where they are.

    Raises:
        UserError: The hub cannot be reached, or does not let them in.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=hub_files(has_heads),
            commit_message='Model of timm-multilabel')
    except Exception as error:  # of the network and of the hub, each of its own kind
        reason = ' '.join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f'--push {repo}: cannot be uploaded ({reason}); {folder} is complete, and can be pushed later with '
            f'`hf upload {repo} {folder}`') from error
    return str(commit)
