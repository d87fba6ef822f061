"""Upload a folder to a hub: Hugging Face or ModelScope."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmtool.errors import MMToolError
from mmtool.finetuned import TRAINER_STATE, VAL_DATASET
from mmtool.groups.export import PushArgs
from mmtool.log import get_logger

logger = get_logger(__name__)

# Rows that people kept to themselves, and what only going on with a run needs.
PRIVATE = [VAL_DATASET, TRAINER_STATE, "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainable.safetensors"]
PRIVATE += ["global_step*", "global_step*/**", "training_args.bin", "latest", ".*"]


def check_push(given: PushArgs, hub: str) -> None:
    """Raise MMToolError where the package of the hub is missing; before anything long is done."""
    if given.push_to_hub and (given.push_hub or hub) == "ms":
        _modelscope()


def push(folder: Path, given: PushArgs, hub: str, message: str) -> str:
    """Upload a folder; return the address of the repository.

    Args:
        folder: what to upload; rows kept to evaluate on and the state of training stay here.
        given: repository and token.
        hub: ``hf`` or ``ms``, unless ``given`` says.
        message: of the commit.

    Raises:
        MMToolError: when the hub cannot be reached or refuses.
    """
    assert given.hub_model_id is not None
    if (given.push_hub or hub) == "ms":
        return _to_modelscope(folder, given, message)
    return _to_hugging_face(folder, given, message)


def _to_hugging_face(folder: Path, given: PushArgs, message: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=given.hub_token, library_name="mmtool")
    try:
        private = given.hub_private_repo or None
        url = api.create_repo(given.hub_model_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message, ignore_patterns=PRIVATE)
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise _refused(given, "Hugging Face", error, "HF_TOKEN") from error
    return str(url)


def _to_modelscope(folder: Path, given: PushArgs, message: str) -> str:
    api_class, hub_error = _modelscope()
    api = api_class(token=given.hub_token)
    try:
        visibility = "private" if given.hub_private_repo else "public"
        api.create_repo(given.hub_model_id, repo_type="model", visibility=visibility, exist_ok=True)
        api.upload_folder(
            repo_id=given.hub_model_id,
            folder_path=str(folder),
            commit_message=message,
            ignore_patterns=PRIVATE,
            use_cache=False,
        )
    except (hub_error, OSError, ValueError) as error:
        raise _refused(given, "ModelScope", error, "MODELSCOPE_API_TOKEN") from error
    return given.hub_model_id


def _modelscope() -> tuple[Any, Any]:
    try:
        from modelscope.hub.api import HubApi
        from modelscope_hub.errors import HubError
    except ModuleNotFoundError as error:
        raise MMToolError(
            "--push_to_hub true to ModelScope needs the package modelscope", "pip install 'mmtool[hub]'"
        ) from error
    return HubApi, HubError


def _refused(given: PushArgs, hub: str, error: Exception, variable: str) -> MMToolError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return MMToolError(
        f"--hub_model_id {given.hub_model_id}: {hub} did not take the upload: {reason}",
        f"Check the connection, and that {variable} or --hub_token may write there; what was exported is kept.",
    )
