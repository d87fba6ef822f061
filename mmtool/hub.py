"""Model type, id or path -> local folder. The network is used only for an id, or a type without a folder."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from mmtool.errors import CheckpointError, MMToolError
from mmtool.log import get_logger
from mmtool.spec import ModelSpec
from mmtool.utils import import_object

_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What a model folder needs: weights, configuration, tokenizer. Never code.
_WEIGHTS = (".safetensors", ".bin")
_FOLDER_HINT = "Give the folder that holds config.json and the weights."
_TIMEOUT = 10.0  # seconds, for the one request that shows whether there is a network
_OTHER = (".json", ".model", ".txt", ".jinja", ".tiktoken")

logger = get_logger(__name__)


def resolve_folder(spec: ModelSpec | None, model_id_or_path: str | Path | None = None, *, hub: str = "hf") -> Path:
    """Return the local folder of a model.

    Args:
        spec: entry of the model type; None when only ``model_id_or_path`` tells which model is meant.
        model_id_or_path: an existing folder, or an id on the hub; None takes the embedded folder or the id of ``spec``.
        hub: ``hf`` or ``ms``, where ids are looked up.
    """
    if model_id_or_path is not None:
        path = Path(model_id_or_path).expanduser()
        if path.exists():
            return _checked(path)
        if not _is_id(str(model_id_or_path)):
            raise MMToolError(
                f"--model_id_or_path {model_id_or_path}: there is no such folder",
                f"{_FOLDER_HINT[:-1]}, or a hub id of the form owner/name.",
            )
        return _download(str(model_id_or_path), hub)
    if spec is None:
        raise MMToolError("no model was named", "Pass --model_type or --model_id_or_path.")
    if spec.embedded is not None:
        return Path(__file__).parent / "models" / spec.family / spec.embedded
    model_id = spec.ms_id if hub == "ms" else spec.hf_id
    if model_id is None:
        raise MMToolError(f"{spec.model_type} is not on the hub {hub!r}", "Pass its folder with --model_id_or_path.")
    return _download(model_id, hub)


def _checked(path: Path) -> Path:
    if not path.is_dir():
        hint = f"Give its folder: --model_id_or_path {path.parent}"
        raise MMToolError(f"--model_id_or_path {path} is a file, but a folder with weights is needed", hint)
    if not (path / "config.json").is_file():
        what = "is empty" if not any(path.iterdir()) else "has no config.json"
        raise CheckpointError(f"--model_id_or_path {path} {what}", _FOLDER_HINT)
    return path


def _is_id(text: str) -> bool:
    """Whether ``text`` can be a hub id; ``runs/last`` beside an existing folder ``runs`` is a mistyped path."""
    return bool(_ID.fullmatch(text)) and text[0] not in ".~" and not Path(text).parent.exists()


def wanted_files(names: Iterable[str]) -> list[str]:
    """Choose from a repository's file names: no code, and no second copy of weights (safetensors before .bin)."""
    paths = [PurePosixPath(name) for name in names]
    with_safetensors = {path.parent for path in paths if path.suffix == ".safetensors"}
    chosen = []
    for path in paths:
        duplicate = path.suffix == ".bin" and path.parent in with_safetensors
        if path.suffix in _OTHER + _WEIGHTS and not duplicate:
            chosen.append(str(path))
    return chosen


def _download(model_id: str, hub: str) -> Path:
    return _from_modelscope(model_id) if hub == "ms" else _from_hugging_face(model_id)


def _from_hugging_face(model_id: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    try:
        # One request without retries: a machine without network learns it at once, not after half a minute.
        names = [file.rfilename for file in HfApi().model_info(model_id, timeout=_TIMEOUT).siblings or []]
    except (HTTPError, OSError) as error:
        try:
            folder = Path(snapshot_download(model_id, allow_patterns=["config.json"], local_files_only=True))
        except LocalEntryNotFoundError:
            raise _unavailable(model_id, "Hugging Face", _reason(error)) from error
        logger.warning("%s: %s; using the copy in the cache", model_id, _reason(error))
        return _checked(folder)
    logger.info("%s: downloading from Hugging Face what is not in the cache yet", model_id)
    wanted = [glob.escape(name) for name in wanted_files(names)]
    try:
        return _checked(Path(snapshot_download(model_id, allow_patterns=wanted)))
    except (HTTPError, OSError) as error:
        raise _unavailable(model_id, "Hugging Face", f"the download broke off: {error}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, GatedRepoError):
        return "its owner grants access on request, and this account has none"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private"
    return f"the hub cannot be reached ({str(error).splitlines()[0] if str(error) else type(error).__name__})"


def _unavailable(model_id: str, hub: str, reason: str) -> MMToolError:
    return MMToolError(
        f"cannot get {model_id} from {hub}: {reason}",
        "Pass the folder of a local copy with --model_id_or_path FOLDER.",
    )


def _from_modelscope(model_id: str) -> Path:
    try:
        from modelscope import snapshot_download
        from modelscope.hub.utils.utils import get_endpoint
        from modelscope_hub.errors import HubError
    except ModuleNotFoundError as error:
        raise MMToolError("--hub ms needs the package modelscope", "Install it: pip install 'mmtool[hub]'") from error
    patterns = [f"*{suffix}" for suffix in _OTHER + _WEIGHTS]
    # Asked first, because the download would try again for half a minute.
    offline = not import_object("mmtool.download:reachable")(get_endpoint(), timeout=_TIMEOUT)
    try:
        return _checked(Path(snapshot_download(model_id, allow_patterns=patterns, local_files_only=offline)))
    except (HubError, OSError, ValueError) as error:
        reason = f"{get_endpoint()} cannot be reached" if offline else str(error).splitlines()[0]
        raise _unavailable(model_id, "ModelScope", reason) from error
