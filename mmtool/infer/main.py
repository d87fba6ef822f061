"""The story of `mmtool infer`: find the model, check what was asked, load the weights, answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmtool import log
from mmtool.args import GenerationArgs, InferArgs, TemplateArgs
from mmtool.engine.base import Sampling
from mmtool.engine.create import create_engine
from mmtool.errors import TooLongError
from mmtool.infer.answer import Model
from mmtool.infer.batch import DatasetRun
from mmtool.infer.chat import run_chat
from mmtool.infer.single import answer_question, read_question
from mmtool.infer.terminal import Terminal, accept_any_text
from mmtool.loader import get_template, load_model, load_processor, open_folder
from mmtool.models.common.folders import read_json
from mmtool.spec import ModelSpec
from mmtool.template.base import Template
from mmtool.utils import collection_paused, import_object

logger = log.get_logger(__name__)


def infer_main(args: InferArgs) -> None:
    """Chat, answer one question, or answer the rows of a dataset.

    What can be wrong without the weights is found before they load.
    """
    accept_any_text()
    spec, folder = open_folder(args.model.model_type, args.model.model_id_or_path, hub=args.model.hub)
    template = open_template(args.template, spec, folder)
    system = args.template.system
    if args.input.query is not None:
        messages = read_question(args.input, spec, system)
        with log.timed("encode"):
            check_length(template.encode(messages)["input_ids"], folder)  # media stay prepared with their messages
        model = load(args, spec, folder, template)
        answer_question(model, messages, as_json=args.input.json, stream=args.generation.stream)
    elif args.data.val_dataset is not None:
        with DatasetRun(args.data, spec, system) as run:
            if run.finished:
                logger.info("%s: every row is answered already", run.results.path)
            else:
                run.answer(load(args, spec, folder, template))
    else:
        run_chat(load(args, spec, folder, template), Terminal(), system=system, stream=args.generation.stream)


def open_template(given: TemplateArgs, spec: ModelSpec, folder: Path) -> Template:
    """Return what writes prompts; it needs the files of the processor only."""
    with log.timed("import"), collection_paused(freeze=True):  # most of transformers comes with these
        import_object(spec.processor_class)
        import_object(spec.model_class)
    with log.timed("processor"), collection_paused(freeze=True):
        return get_template(
            spec,
            load_processor(spec, folder),
            max_length=given.max_length,
            truncation_strategy=given.truncation_strategy,
        )


def check_length(input_ids: Sequence[int], folder: Path) -> None:
    """Raise TooLongError for a prompt that leaves no position for an answer, going by the folder's config.json."""
    config = read_json(folder / "config.json")
    limit = config.get("text_config", config).get("max_position_embeddings")
    if limit is not None and len(input_ids) >= limit:
        raise TooLongError(
            f"the question takes {len(input_ids)} positions, but the model has {limit}, answer included",
            "Ask a shorter question, or give fewer or smaller pictures.",
            length=len(input_ids),
            limit=limit,
        )


def load(args: InferArgs, spec: ModelSpec, folder: Path, template: Template) -> Model:
    """Load the weights and make the engine."""
    given = args.model
    with log.timed("load"), collection_paused(freeze=True):
        network, processor = load_model(
            spec,
            folder,
            dtype=given.dtype,
            device_map=given.device_map,
            attn_impl=given.attn_impl,
            model_kwargs=given.model_kwargs,
            processor=template.processor,
        )
        engine = create_engine(network, processor, args.infer_backend, max_batch_size=args.data.max_batch_size)
    sampling = read_sampling(args.generation, network.generation_config)
    return Model(spec, template, engine, sampling, show_prompt=args.template.show_prompt)


def read_sampling(given: GenerationArgs, generation_config: object) -> Sampling:
    """Return how tokens are chosen: as asked for, and otherwise as the release says."""
    return Sampling.from_generation_config(
        generation_config,
        max_new_tokens=given.max_new_tokens,
        do_sample=given.do_sample,
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        repetition_penalty=given.repetition_penalty,
        seed=given.seed,
        stop=tuple(given.stop_words),
    )
