"""What the families' configurations share: a release's flat ``config.json``, read into parts and written flat again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig

from mmtool.errors import CheckpointError
from mmtool.models.common.folders import dump_json, local_folder, read_json

# Bookkeeping of transformers that has no place in a released config.json.
INTERNAL_KEYS = (
    *("text_config", "vision_config", "audio_config", "return_dict", "output_hidden_states", "output_attentions"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "num_labels", "problem_type"),
)


class ReleaseConfig(PreTrainedConfig):
    """Configuration of a model whose release has one flat ``config.json``, and other files that complete it."""

    release_files: ClassVar[tuple[str, ...]] = ("*.json",)  # what is downloaded to read the configuration

    @classmethod
    def nested(cls, config: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
        """Return the settings of a released ``config.json`` with the parts apart; nested ones pass through.

        Args:
            config: its content.
            folder: where the other files are; None where nobody knows.
        """
        raise NotImplementedError

    @classmethod
    def own_settings(cls, config: Mapping[str, Any], others: Sequence[str]) -> dict[str, Any]:
        """Return the settings of the model as a whole in a released ``config.json``; ``others`` belong to its parts."""
        others = (*others, "_name_or_path", "model_type", "torch_dtype")
        known = cls.__dataclass_fields__
        own = {
            key: value
            for key, value in config.items()
            if key not in others and (value is not None or key not in known)  # null is the default
        }
        if own.get("dtype") is None and config.get("torch_dtype") is not None:
            own["dtype"] = config["torch_dtype"]
        return own

    def to_release_dict(self) -> dict[str, Any]:
        """Return the settings as a release writes them: flat, unknown keys kept."""
        raise NotImplementedError

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the nested settings of a folder or hub id, and the arguments that are not about finding it."""
        folder, rest = local_folder(pretrained_model_name_or_path, kwargs, cls.release_files)
        return cls.nested(read_json(folder / "config.json"), folder), rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from nested settings, or from a released ``config.json``; ``name_or_path`` says where it came from."""
        if "text_config" not in config_dict:
            name = kwargs.get("name_or_path") or config_dict.get("name_or_path")
            folder = None
            if name is not None:
                folder, kwargs = local_folder(name, kwargs, cls.release_files)
            config_dict = cls.nested(config_dict, folder)
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            where = kwargs.get("name_or_path") or config_dict.get("name_or_path") or "the model folder"
            reason = " ".join(str(error.__cause__ or error).split())
            raise CheckpointError(
                f"config.json of {where} contradicts itself: {reason}", "Take config.json from the release."
            ) from error

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write the release's flat ``config.json``; ``use_diff`` is transformers' and changes nothing."""
        dump_json(json_file_path, self.to_release_dict(), sort_keys=True)


def released_rope(rope_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``rope_parameters`` by the names that releases have: ``rope_theta`` and ``rope_scaling``."""
    rope = {key: value for key, value in rope_parameters.items() if key not in ("rope_theta", "rope_type", "type")}
    rope_type = rope_parameters.get("rope_type", "default")
    scaling = None if rope_type == "default" else {"type": rope_type, **rope}
    return {"rope_theta": rope_parameters["rope_theta"], "rope_scaling": scaling}
