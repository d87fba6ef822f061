"""Options of the prompt and of the answer, for every command that generates."""

from dataclasses import dataclass
from typing import Any, Literal

from mmtool.errors import MMToolError
from mmtool.groups.checks import require, unset_or
from mmtool.options import opt


@dataclass(kw_only=True)
class PromptArgs:
    """Prompt"""

    system: str | None = opt(None, "System text. Default: the template's own; an empty text means none.")
    max_length: int | None = opt(
        None, "Most positions of the conversation before the answer; a picture counts those it takes."
    )
    truncation_strategy: Literal["delete", "truncation_left", "raise"] = opt(
        "delete",
        "A conversation over --max_length: drop the row, cut its oldest positions (never inside a picture), or stop.",
    )
    template_kwargs: dict[str, Any] | None = opt(None, "More settings of the template.", metavar="JSON")

    def __post_init__(self) -> None:
        if self.max_length == -1:
            self.max_length = None
        require(self.max_length is None or self.max_length > 0, "max_length", self.max_length, "a number above 0")


@dataclass(kw_only=True)
class TemplateArgs(PromptArgs):
    """Prompt"""

    show_prompt: bool = opt(False, "Print what the model really sees, with media spans and control tokens, to stderr.")


@dataclass(kw_only=True)
class SamplingArgs:
    """Generation (defaults come with the model)"""

    max_new_tokens: int | None = opt(None, "Most tokens in one answer.")
    do_sample: bool | None = opt(
        None,
        "Draw tokens at random; false always takes the likeliest. --temperature, --top_p and --top_k turn it on.",
    )
    temperature: float | None = opt(None, "Randomness of sampling, above 0; 0 means --do_sample false.")
    top_p: float | None = opt(None, "Draw from the likeliest tokens that share this much probability, above 0 up to 1.")
    top_k: int | None = opt(None, "Draw from this many likeliest tokens; 0 means all.")
    repetition_penalty: float | None = opt(None, "Above 1 makes tokens that are already there less likely.")
    num_beams: int = opt(1, "Only 1; beam search is not supported: it cannot stream and multiplies the KV cache.")
    stop_words: list[str] = opt([], "Texts that end the answer, beside those of the template.")
    seed: int | None = opt(None, "Seed of sampling: the same seed gives the same answer, alone or in a batch.")

    def __post_init__(self) -> None:
        length, penalty = self.max_new_tokens, self.repetition_penalty
        require(unset_or(length, lambda n: n > 0), "max_new_tokens", length, "a number above 0")
        require(unset_or(self.temperature, lambda t: t >= 0), "temperature", self.temperature, "a number from 0")
        require(unset_or(self.top_p, lambda p: 0 < p <= 1), "top_p", self.top_p, "a number above 0, at most 1")
        require(unset_or(self.top_k, lambda k: k >= 0), "top_k", self.top_k, "a number from 0 (all tokens)")
        require(unset_or(penalty, lambda p: p > 0), "repetition_penalty", penalty, "a number above 0, such as 1.05")
        require(unset_or(self.seed, lambda s: 0 <= s < 2**63), "seed", self.seed, "a number from 0 to 2**63 - 1")
        require(self.num_beams >= 1, "num_beams", self.num_beams, "1")
        if self.num_beams > 1:
            raise MMToolError(
                f"--num_beams {self.num_beams} is not supported: beam search cannot stream and multiplies the KV cache",
                "Leave it out; --do_sample false gives the one answer that greedy search finds.",
            )
        self._settle_sampling()

    def _settle_sampling(self) -> None:
        """Let temperature 0 mean greedy, and other sampling options mean sampling unless do_sample is set."""
        if self.temperature == 0:
            self.do_sample = False
        elif self.do_sample is None and any(value is not None for value in (self.temperature, self.top_p, self.top_k)):
            self.do_sample = True


@dataclass(kw_only=True)
class GenerationArgs(SamplingArgs):
    """Generation (defaults come with the model)"""

    stream: bool = opt(True, "Print the answer while it is being made.")
