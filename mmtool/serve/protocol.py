"""The requests of OpenAI's interface: which fields there are, their types and ranges.

Messages, tools and response formats stay plain dicts here; ``conversation`` and ``grammar`` read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmtool.log import get_logger
from mmtool.serve.errors import ApiError, bad_request

logger = get_logger(__name__)

MAX_LOGPROBS = 20
_SEED = 2**63

# Of OpenAI's fields: without effect here, and harmless.
_WITHOUT_EFFECT = {
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("reasoning_effort", "verbosity", "web_search_options", "best_of"),
}
# They would change the answer, so that leaving them out in silence would be wrong.
_REFUSED = {
    "functions": "Use tools.",
    "function_call": "Use tool_choice.",
    "audio": "Answers are text only.",
    "prediction": "",
    "suffix": "",
    "chat_template": "The template is the server's.",
    "chat_template_kwargs": "The template's settings are the server's, see --template_kwargs.",
    "mm_processor_kwargs": "The processor's settings are the server's, see --processor_kwargs.",
    "guided_json": "Use response_format.",
    "guided_regex": "Use response_format.",
    "guided_choice": "Use response_format with an enum.",
    "guided_grammar": "Use response_format.",
    "structured_outputs": "Use response_format.",
    "use_beam_search": "",
    "prompt_logprobs": "Use echo with logprobs at /v1/completions.",
}

Probability = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
StopTexts = Annotated[list[StopText], Field(max_length=16)]
Whole = TypeVar("Whole", bound=BaseModel)


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Fields):
    """What a stream says beside the answer."""

    include_usage: bool | None = None


class SamplingFields(_Fields):
    """How tokens are chosen; what is left out is as the server was told, or as the model's release says."""

    model: str | None = Field(None, max_length=500)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    seed: Annotated[int, Field(ge=-_SEED, lt=_SEED)] | None = None
    stop: StopText | StopTexts | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = None
    # Beyond OpenAI's, by the names that other servers use.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=64)] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with what the answer took."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def torch_seed(self) -> int | None:
        """The seed as torch takes it."""
        return None if self.seed is None else self.seed % _SEED

    @model_validator(mode="after")
    def _only_known(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: is for stream true only")
        for name, value in (self.model_extra or {}).items():
            if name in _REFUSED and value is not None:
                raise ValueError(f"{name}: is not supported. {_REFUSED[name]}".rstrip())
            if name == "modalities" and value not in (None, ["text"]):
                raise ValueError("modalities: answers are text only")
            if name not in _WITHOUT_EFFECT and name not in _REFUSED and name != "modalities":
                _say_once(name)
        return self


class ChatRequest(SamplingFields):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives are told for each token; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _logprobs_belong_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs true")
        return self


class CompletionRequest(SamplingFields):
    """Body of ``POST /v1/completions``."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=64)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=64)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or its token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @model_validator(mode="after")
    def _answers_something(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 is for echo true only")
        best_of = (self.model_extra or {}).get("best_of")
        if best_of is not None and best_of != (self.n or 1):
            raise ValueError("best_of: is not supported. Use n.")
        return self


class TokenizeRequest(_Fields):
    """Body of ``POST /v1/tokenize``: a text, or a conversation."""

    model: str | None = Field(None, max_length=500)
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=10_000)] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        return self


def read_body(cls: type[Whole], body: bytes) -> Whole:
    """Return a request from its JSON.

    Raises:
        ApiError: 400, naming the first field that is wrong.
    """
    try:
        return cls.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error, cls) from None


def check_fields(cls: type[Whole], fields: Mapping[str, Any]) -> Whole:
    """Return a request from its fields; errors as in ``read_body``."""
    try:
        return cls.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error, cls) from None


def _refusal(error: ValidationError, cls: type[BaseModel]) -> ApiError:
    # Of a union every member says what it misses; the deepest has understood most of it, then one of the right type.
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]["loc"][:1]
    found = [item for item in error.errors(include_url=False, include_context=False) if item["loc"][:1] == first]
    worst = max(found, key=lambda item: (len(item["loc"]), not item["type"].endswith("_type")))
    if worst["type"] == "json_invalid":
        return bad_request(f"The body is not JSON: {worst['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json")
    if worst["type"] == "value_error":
        name, _, text = worst["msg"].removeprefix("Value error, ").partition(": ")
        return bad_request(f"{name}: {text}", param=name)
    if not worst["loc"]:
        return bad_request("The body must be a JSON object.")
    steps = [step for step in worst["loc"] if isinstance(step, int) or step in cls.model_fields or _is_word(step)]
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
    return bad_request(f"{place}: {worst['msg'][:1].lower()}{worst['msg'][1:]}", param=place)


def _is_word(step: object) -> bool:
    """Tell a key of the request from pydantic's names of types in a path, such as ``list[str]`` or ``str``."""
    text = str(step)
    return (
        len(text) <= 100
        and not any(char in text for char in "[]()<>")
        and text not in ("str", "int", "constrained-str")
    )


_said: set[str] = set()


def _say_once(name: str) -> None:
    if name not in _said and len(_said) < 100:  # names come from clients: keep few of them
        _said.add(name)
        logger.warning("the field %.80r of a request is not known and has no effect (said once)", name)
