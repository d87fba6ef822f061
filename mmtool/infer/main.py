"""The story of `mmtool infer`: find the model, check what was asked, load the weights, answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtool import log
from mmtool.args import InferArgs
from mmtool.engine.base import Sampling
from mmtool.engine.create import open_engine
from mmtool.errors import CheckpointError, TooLongError
from mmtool.finetuned import FineTuned, open_finetuned
from mmtool.groups.prompt import PromptArgs, SamplingArgs
from mmtool.infer.answer import Model
from mmtool.infer.batch import DatasetRun
from mmtool.infer.chat import run_chat
from mmtool.infer.single import answer_question, read_question
from mmtool.infer.terminal import Terminal, accept_any_text
from mmtool.loader import get_template, load_processor, open_folder
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
    finetuned = open_checkpoint(args)
    spec, folder = open_folder(args.model.model_type, args.model.model_id_or_path, hub=args.model.hub)
    template = open_template(args.template, spec, folder, args.model.processor_kwargs)
    system = args.template.system
    if args.input.query is not None:
        messages = read_question(args.input, spec, system)
        with log.timed("encode"):
            check_length(template.encode(messages)["input_ids"], folder)  # media stay prepared with their messages
        model = load(args, spec, folder, template, finetuned)
        answer_question(model, messages, as_json=args.input.json, stream=args.generation.stream)
    elif args.data.val_dataset is not None:
        name = None if finetuned is None else finetuned.folder.name
        with DatasetRun(args.data, spec, system, name) as run:
            if run.finished:
                logger.info("%s: every row is answered already", run.results.path)
            else:
                run.answer(load(args, spec, folder, template, finetuned))
    else:
        model = load(args, spec, folder, template, finetuned)
        run_chat(model, Terminal(), system=system, stream=args.generation.stream)


def open_checkpoint(args: InferArgs) -> FineTuned | None:
    """Return the checkpoint of ``--ckpt_dir``, and set the options that it knows and the user did not give."""
    given = args.checkpoint
    if given.ckpt_dir is None:
        return None
    finetuned = open_finetuned(given.ckpt_dir)
    finetuned.fill(args.model, args.explicit)
    finetuned.fill(args.template, args.explicit)
    if given.load_dataset_config:
        if not finetuned.val_dataset.is_file():
            raise CheckpointError(
                f"--load_dataset_config true: {finetuned.run} has no {finetuned.val_dataset.name}",
                "The run kept no rows to evaluate on; name some with --val_dataset.",
            )
        args.data.val_dataset = str(finetuned.val_dataset)
    return finetuned


def open_template(
    given: PromptArgs,
    spec: ModelSpec,
    folder: Path,
    processor_kwargs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Template:
    """Return what writes prompts, with further ``settings`` of ``Template``; it needs the processor's files only."""
    with log.timed("import"), collection_paused(freeze=True):  # most of transformers comes with these
        import_object(spec.processor_class)
        import_object(spec.model_class)
    with log.timed("processor"), collection_paused(freeze=True):
        return get_template(
            spec,
            load_processor(spec, folder, processor_kwargs=processor_kwargs),
            given.template_kwargs,
            max_length=given.max_length,
            truncation_strategy=given.truncation_strategy,
            **settings,
        )


def check_length(input_ids: Sequence[int], folder: Path) -> None:
    """Raise TooLongError for a prompt that leaves no position for an answer, going by the folder's config.json."""
    config = read_json(folder / "config.json")
    text = config.get("text_config", config)
    limit = text.get("max_position_embeddings")
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if "dynamic" in (rope.get("type"), rope.get("rope_type")):  # beyond its positions the angles adapt
        limit = text.get("max_length")
    if limit is not None and len(input_ids) >= limit:
        raise TooLongError(
            f"the question takes {len(input_ids)} positions, but the model has {limit}, answer included",
            "Ask a shorter question, or give fewer or smaller pictures.",
            length=len(input_ids),
            limit=limit,
        )


def load(
    args: InferArgs, spec: ModelSpec, folder: Path, template: Template, finetuned: FineTuned | None = None
) -> Model:
    """Load the weights, an adapter on them if there is one, and make the engine."""
    with log.timed("load"), collection_paused(freeze=True):
        engine, generation_config = open_engine(
            args.infer_backend,
            args.model,
            args.vllm,
            spec,
            folder,
            template,
            finetuned,
            merge_lora=args.checkpoint.merge_lora,
            max_batch_size=args.data.max_batch_size,
            max_model_len=args.vllm.max_model_len,
        )
    sampling = read_sampling(args.generation, generation_config)
    return Model(spec, template, engine, sampling, show_prompt=args.template.show_prompt)


def read_sampling(given: SamplingArgs, generation_config: object) -> Sampling:
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
