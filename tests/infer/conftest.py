"""A small model for all tests of this folder; its weights are random, which does not matter here."""

from pathlib import Path

import pytest

from mmtool.args import InferArgs
from mmtool.groups.infer import InferDataArgs
from mmtool.groups.model import ModelArgs
from mmtool.infer.main import load
from mmtool.loader import get_template, load_processor, open_folder


@pytest.fixture(scope="session")
def checkpoint(golden) -> Path:
    return golden("yi-vl") / "checkpoint"


@pytest.fixture(scope="session")
def load_small(checkpoint):
    """Load the model for a batch size, with answers of at most 12 tokens."""

    def load_small(max_batch_size: int = 1):
        args = InferArgs(
            model=ModelArgs(model_id_or_path=str(checkpoint)), data=InferDataArgs(max_batch_size=max_batch_size)
        )
        args.generation.max_new_tokens = 12
        spec, folder = open_folder(None, checkpoint)
        return load(args, spec, folder, get_template(spec, load_processor(spec, folder)))

    return load_small


@pytest.fixture(scope="session")
def model(load_small):
    return load_small()
