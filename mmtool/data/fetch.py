"""Named datasets from a hub to local files. Pictures that a hub keeps inside tables or archives are written out once,
beside a ``rows.jsonl`` that names them, in the cache folder.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmtool.data.dataset import SUFFIXES, read_rows
from mmtool.data.formats import rename_columns
from mmtool.data.media_cache import cache_folder
from mmtool.data.registry import DatasetSpec, Hub, HubSet
from mmtool.download import reachable
from mmtool.errors import DataError, MMToolError
from mmtool.log import get_logger

_HUBS = {"hf": "Hugging Face", "ms": "ModelScope"}
_TIMEOUT = 10.0  # seconds, for the one request that shows whether there is a network
_ENDINGS = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"GI": ".gif", b"RI": ".webp", b"BM": ".bmp"}
_PER_FOLDER = 1000

logger = get_logger(__name__)


def fetch_files(spec: DatasetSpec, hub: Hub) -> tuple[Path, ...]:
    """Return the data files of a set on a hub, downloaded where they are not in the cache.

    Raises:
        MMToolError: where the hub does not have it, or cannot be reached.
    """
    place = spec.hf if hub == "hf" else spec.ms
    if place is None:
        other = "ms" if hub == "hf" else "hf"
        raise MMToolError(f"dataset {spec.name} is not on {_HUBS[hub]}", f"Pass --dataset_hub {other}.")
    if place.subset is None and not spec.constants:
        return _download(spec.name, place, hub)
    folder = cache_folder() / "datasets" / hub / place.repo.replace("/", "--")
    return tuple(_written_out(spec, place, hub, folder, split) for split in place.splits)


def _written_out(spec: DatasetSpec, place: HubSet, hub: Hub, folder: Path, split: str) -> Path:
    """Return the ``rows.jsonl`` of a split, made unless it is there."""
    done = folder / split / "rows.jsonl"
    if not done.exists():
        if place.subset is None:
            rows: Iterable[Mapping[str, Any]] = _rows_of(_download(spec.name, place, hub))
        else:
            rows = _load_split(spec.name, place, split)
        logger.info("%s: writing the pictures of split %r to %s", spec.name, split, done.parent)
        write_out(rows, spec, done)
    return done


def write_out(rows: Iterable[Mapping[str, Any]], spec: DatasetSpec, path: Path) -> None:
    """Write rows with pictures inside as a data file and files of pictures beside it.

    Only the columns that ``spec`` names are kept, under their new names. The file gets its name when it is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for index, row in enumerate(rows):
            kept = rename_columns({key: row[key] for key in spec.columns if row.get(key) is not None}, spec.columns)
            kept["images"] = [_picture_file(kept["images"], path.parent, index)]
            answer = kept["response"][0] if isinstance(kept["response"], list) else kept["response"]
            kept["response"] = answer.split("&&")[0]  # how ModelScope's copy joins the captions of a picture
            file.write(json.dumps({**spec.constants, **kept}, ensure_ascii=False) + "\n")
            if (index + 1) % 10_000 == 0:
                logger.info("%s: %d rows", spec.name, index + 1)
    unfinished.replace(path)


def _picture_file(value: Any, folder: Path, index: int) -> str:
    """Return the path of a picture for a row in ``folder``; one that is no file yet is written."""
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        value = base64.b64decode(content) if isinstance(content, str) else content or path
    if isinstance(value, str | Path):
        return str(Path(value).absolute())
    if not isinstance(value, bytes):  # a decoded picture
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        value = buffer.getvalue()
    name = f"images/{index // _PER_FOLDER:04d}/{index:07d}{_ENDINGS.get(value[:2], '')}"
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(value)
    return name


def _rows_of(files: Iterable[Path]) -> Iterator[Mapping[str, Any]]:
    for file in files:
        for _, row in read_rows(file):
            if isinstance(row, DataError):
                raise row
            yield row


def _download(name: str, place: HubSet, hub: Hub) -> tuple[Path, ...]:
    """Return the data files of a repository.

    Raises:
        MMToolError: where it cannot be had, or has none.
    """
    logger.info("%s: downloading %s from %s what is not in the cache yet", name, place.repo, _HUBS[hub])
    folder = _hf_folder(name, place) if hub == "hf" else _ms_folder(name, place)
    found = {path for pattern in place.files for path in folder.glob(pattern) if path.suffix.lower() in SUFFIXES}
    train = {path for path in found if path.name.startswith("train")}
    files = tuple(sorted(train or found))
    if not files:
        raise MMToolError(
            f"dataset {name}: {place.repo} on {_HUBS[hub]} has no data file like {', '.join(place.files)}",
            "Download it and give its files with --dataset.",
        )
    return files


def _hf_folder(name: str, place: HubSet) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = list(place.files)
    try:
        # One request without retries: a machine without network learns it at once, not after half a minute.
        HfApi().dataset_info(place.repo, timeout=_TIMEOUT)
    except (HTTPError, OSError, OfflineModeIsEnabled) as error:
        try:
            cached = snapshot_download(place.repo, repo_type="dataset", allow_patterns=patterns, local_files_only=True)
        except (LocalEntryNotFoundError, OSError):
            raise _unavailable(name, "hf", error) from None
        logger.warning("%s: %s cannot be reached; using the copy in the cache", name, _HUBS["hf"])
        return Path(cached)
    try:
        return Path(snapshot_download(place.repo, repo_type="dataset", allow_patterns=patterns))
    except (HTTPError, OSError) as error:
        raise _unavailable(name, "hf", error) from None


def _ms_folder(name: str, place: HubSet) -> Path:
    try:
        from modelscope import dataset_snapshot_download
    except ModuleNotFoundError:
        raise _no_modelscope(name) from None
    _check_modelscope(name)
    try:
        return Path(dataset_snapshot_download(place.repo, allow_patterns=list(place.files)))
    except Exception as error:  # the library's own kinds of errors differ from version to version
        raise _unavailable(name, "ms", error) from error


def _load_split(name: str, place: HubSet, split: str) -> Iterator[Mapping[str, Any]]:
    """Give the rows of a split that only ModelScope's library can load, pictures still encoded where it can do that."""
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError:
        raise _no_modelscope(name) from None
    _check_modelscope(name)
    try:
        loaded = MsDataset.load(place.repo, subset_name=place.subset, split=split)
    except Exception as error:  # as above
        raise _unavailable(name, "ms", error) from error
    rows = loaded.to_hf_dataset() if hasattr(loaded, "to_hf_dataset") else loaded
    if hasattr(rows, "cast_column"):
        import datasets

        rows = rows.cast_column("image", datasets.Image(decode=False))
    return iter(rows)


def _check_modelscope(name: str) -> None:
    """Raise at once where there is no network: the library would try again for minutes."""
    from modelscope.hub.utils.utils import get_endpoint

    endpoint = get_endpoint()
    if not reachable(endpoint, timeout=_TIMEOUT):
        raise _unavailable(name, "ms", OSError(f"{endpoint} cannot be reached"))


def _no_modelscope(name: str) -> MMToolError:
    return MMToolError(
        f"dataset {name} comes from ModelScope, which needs a package",
        "Install it: pip install 'modelscope[datasets]', or give a local file with --dataset.",
    )


def _unavailable(name: str, hub: str, error: Exception) -> MMToolError:
    lines = str(error).strip().splitlines()
    return MMToolError(
        f"cannot get dataset {name} from {_HUBS[hub]}: {lines[0] if lines else type(error).__name__}",
        "Try again with a network, or give a local file with --dataset; tiny-shapes is in the package.",
    )
