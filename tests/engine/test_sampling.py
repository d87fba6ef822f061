"""Settings of sampling, and the choice of tokens against transformers' processors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mmtool.engine.base import Sampling
from mmtool.engine.sampling import Draw, RowError, Sampler, unpacked, without_tokens
from mmtool.errors import MMToolError

CPU = torch.device("cpu")
VOCABULARY = 50


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def draws(*settings: Sampling, prompt: tuple[int, ...] = ()) -> list[Draw]:
    return [Draw(sampling, prompt, VOCABULARY, CPU) for sampling in settings]


def drawn(sampling: Sampling, logits: torch.Tensor, count: int) -> torch.Tensor:
    """How often each token comes, of ``count`` draws."""
    rows = draws(*[sampling] * 50)
    sampler = Sampler(rows, CPU)
    ids = torch.cat([sampler(logits.expand(50, -1)) for _ in range(count // 50)])
    return torch.bincount(ids, minlength=VOCABULARY)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_p": 0.6},
        {"top_p": 1e-6},
        {"top_k": 12, "top_p": 0.8, "temperature": 1.3},
        {"top_k": 1000},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"min_p": 0.05, "top_k": 20, "top_p": 0.95, "temperature": 2.0},
    ],
)
def test_tokens_come_as_often_as_transformers_warpers_say(settings):
    logits = logits_of(1)
    warped = TemperatureLogitsWarper(settings.get("temperature", 1.0))(None, logits)
    if "top_k" in settings:
        warped = TopKLogitsWarper(settings["top_k"])(None, warped)
    if "top_p" in settings:
        warped = TopPLogitsWarper(settings["top_p"])(None, warped)
    if "min_p" in settings:
        warped = MinPLogitsWarper(settings["min_p"])(None, warped)
    expected = warped.softmax(-1)[0]
    torch.manual_seed(1)
    count = 20000
    found = drawn(Sampling(do_sample=True, **settings), logits, count)
    assert (found[expected == 0] == 0).all()
    assert (found / count - expected).abs().max() < 0.02


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty):
    prompt = (3, 4, 4, 7)
    sampler = Sampler(draws(Sampling(repetition_penalty=penalty), prompt=prompt), CPU)
    reference = RepetitionPenaltyLogitsProcessor(penalty)
    ids = list(prompt)
    for seed in range(20):
        logits = logits_of(1, seed)
        ids.append(int(reference(torch.tensor([ids]), logits.clone()).argmax()))
        assert sampler(logits).tolist() == ids[-1:]


def test_tokens_seen_stay_with_their_row_when_the_batch_changes():
    one, other = draws(Sampling(repetition_penalty=1000.0), Sampling(), prompt=(0,))
    logits = torch.arange(VOCABULARY, 0, -1.0).unsqueeze(0)
    assert Sampler([one], CPU)(logits).tolist() == [1]
    assert Sampler([other, one], CPU)(logits.expand(2, -1)).tolist() == [0, 2]
    assert Sampler([one], CPU)(logits).tolist() == [3]


def test_presence_and_frequency_penalties_count_the_answer_alone():
    """As OpenAI documents them: taken off the logits once, and once per occurrence."""
    sampling = Sampling(presence_penalty=0.7, frequency_penalty=0.45)
    one, other = draws(sampling, Sampling(), prompt=(3, 4, 4, 7))
    counts = torch.zeros(VOCABULARY)
    logits = logits_of(2, 3)
    plain = logits[1].argmax().item()
    for step in range(25):
        expected = int((logits[0] - 0.45 * counts - 0.7 * (counts > 0)).argmax())
        rows = [other, one] if step % 2 else [one, other]  # rows may change places
        found = Sampler(rows, CPU)(logits.flip(0) if step % 2 else logits).tolist()
        assert found == ([plain, expected] if step % 2 else [expected, plain])
        counts[expected] += 1
    assert counts.max() > 1 and (counts > 0).sum() > 3


def test_negative_penalties_make_tokens_come_again():
    (draw,) = draws(Sampling(presence_penalty=-50.0, do_sample=True, seed=1))
    ids = [Sampler([draw], CPU)(logits_of(1, seed)).item() for seed in range(8)]
    assert len(set(ids)) == 1


def test_a_failing_row_leaves_the_draws_of_all_as_they_were():
    class Broken:
        finished = False

        def allowed(self):
            raise RuntimeError("no")

    good, bad = Sampling(do_sample=True, seed=5), Sampling(do_sample=True, seed=6)
    alone = [Sampler(draws(good), CPU)(logits_of(1)).tolist()]
    row = draws(good)[0]
    with pytest.raises(RowError) as caught:
        Sampler([row, Draw(bad, (), VOCABULARY, CPU, grammar=Broken())], CPU)(logits_of(1).expand(2, -1))
    assert caught.value.row == 1
    assert [Sampler([row], CPU)(logits_of(1)).tolist()] == alone


@given(st.sets(st.integers(0, 127)), st.sets(st.integers(0, 127)), st.integers(97, 128))
def test_packed_masks(tokens, removed, vocab_size):
    words = [0] * 4
    for token in tokens:
        words[token // 32] |= 1 << token % 32
    packed = torch.tensor(words).to(torch.int32)
    for mask, expected in ((packed, tokens), (without_tokens(packed, sorted(removed)), tokens - removed)):
        found = unpacked(torch.stack([mask, packed]), vocab_size)
        assert found.shape == (2, vocab_size)
        assert set(found[0].nonzero().flatten().tolist()) == {token for token in expected if token < vocab_size}


def test_least_length_holds_where_a_grammar_leaves_a_choice():
    class Digits:
        finished = False

        def __init__(self, tokens):
            self.mask = torch.tensor([sum(1 << token for token in tokens)])

        def allowed(self):
            return self.mask.to(torch.int32)

    logits = torch.arange(VOCABULARY, 0, -1.0).unsqueeze(0)
    for tokens, expected in (((3, 9, 31), [9, 9, 3]), ((3,), [3, 3, 3])):
        draw = Draw(Sampling(min_new_tokens=2), (), VOCABULARY, CPU, (3,), Digits(tokens))
        assert [Sampler([draw], CPU)(logits).item() for _ in range(3)] == expected


def test_rows_do_not_depend_on_each_other():
    settings = [
        Sampling(),
        Sampling(do_sample=True, seed=1),
        Sampling(do_sample=True, seed=1, top_k=3),
        Sampling(do_sample=True, seed=2, top_p=0.5),
        Sampling(do_sample=True, seed=3, top_k=20, top_p=0.9, temperature=3.0),
        Sampling(repetition_penalty=1.5),
        Sampling(do_sample=True, seed=4, repetition_penalty=2.0),
        Sampling(do_sample=True, seed=5, min_p=0.1, presence_penalty=1.0, logprobs=2),
        Sampling(frequency_penalty=0.5, logit_bias={3: 2.0, 4: -1.0}),
    ]

    def run(rows: list[int]) -> list[list[int]]:
        sampler = Sampler(draws(*[settings[row] for row in rows], prompt=(1, 2)), CPU)
        return torch.stack([sampler(logits_of(9, seed)[rows]) for seed in range(40)], 1).tolist()

    together = run(list(range(9)))
    assert [run([row])[0] for row in range(9)] == together
    assert run([4, 1, 0]) == [together[4], together[1], together[0]]


def test_zero_temperature_takes_the_likeliest():
    logits = logits_of(1)
    for sampling in (Sampling(do_sample=True, temperature=0.0), Sampling(do_sample=True, temperature=1e-9)):
        assert sampling.greedy
        assert Sampler(draws(sampling), CPU)(logits).tolist() == [int(logits.argmax())]


def test_half_precision_logits():
    settings = [Sampling(), Sampling(do_sample=True, seed=0, top_p=0.9), Sampling(repetition_penalty=1.2)]
    ids = Sampler(draws(*settings), CPU)(logits_of(3).bfloat16())
    assert ids.shape == (3,)


def test_settings_of_a_release_and_what_replaces_them():
    release = GenerationConfig(do_sample=True, temperature=0.2, top_p=0.7, max_new_tokens=256)
    assert Sampling.from_generation_config(release) == Sampling(
        do_sample=True, temperature=0.2, top_p=0.7, max_new_tokens=256
    )
    assert Sampling.from_generation_config(release, temperature=0).greedy
    assert Sampling.from_generation_config(release, do_sample=False, seed=3).greedy
    assert Sampling.from_generation_config(release, temperature=None, max_new_tokens=5).max_new_tokens == 5
    assert Sampling.from_generation_config(GenerationConfig()) == Sampling()
    assert Sampling.from_generation_config(GenerationConfig(), temperature=0.5).do_sample
    assert Sampling.from_generation_config(GenerationConfig(), temperature=0.5, do_sample=False).greedy


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"min_p": 1.1},
        {"presence_penalty": float("inf")},
        {"frequency_penalty": float("nan")},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: float("nan")}},
        {"min_new_tokens": 5, "max_new_tokens": 4},
        {"logprobs": 21},
    ],
)
def test_settings_out_of_range_are_errors_that_name_them(wrong):
    with pytest.raises(MMToolError, match=next(iter(wrong))):
        Sampling(**wrong)
