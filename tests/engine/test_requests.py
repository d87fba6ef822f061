"""What one request may ask for, beside others that ask for something else."""

import dataclasses
import math

import pytest
import torch

from mmtool.errors import MMToolError


def finished(engine, *requests):
    """Drive ``step`` by hand; the deltas of every request."""
    found = [[] for _ in requests]
    for deltas, request in zip(found, requests, strict=True):
        engine.submit(request, deltas.append)
    while engine.busy:
        engine.step()
    return found


def ids_of(deltas):
    return sum((delta.token_ids for delta in deltas), ())


def with_sampling(request, **settings):
    sampling = dataclasses.replace(request.sampling, **settings)
    return dataclasses.replace(request, sampling=sampling)


@pytest.fixture
def sixteen(small):
    """Requests with settings of all kinds, seeded where they draw."""
    settings = [
        {},
        {"do_sample": True, "seed": 1},
        {"do_sample": True, "seed": 2, "top_p": 0.8, "temperature": 1.4},
        {"do_sample": True, "seed": 3, "top_k": 7, "min_p": 0.1},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.8, "frequency_penalty": 0.4},
        {"logit_bias": {5: 4.0, 700: -100.0}},
        {"logprobs": 4},
    ]
    return [
        with_sampling(
            small.request(
                small.ids(300 + index, 3 + 5 * (index % 7)),
                *[small.picture(index % 3)] * (index % 3 == 0),
                small.ids(index, 4),
                max_new_tokens=6 + 3 * (index % 5),
            ),
            **settings[index % len(settings)],
        )
        for index in range(16)
    ]


def test_answers_alone_and_among_fifteen_others_are_the_same(small, sixteen):
    alone = [small.engine().answer(request) for request in sixteen]
    together = small.answers(small.engine(max_batch_size=16), sixteen)
    assert together == [answer.token_ids for answer in alone]
    assert small.answers(small.engine(max_batch_size=5, prefill_chunk=7), sixteen) == together


def test_logprobs_are_the_log_softmax_of_the_model(small):
    plain = small.request(small.ids(1, 12), small.picture(1), small.ids(2, 5), max_new_tokens=6)
    changed = {"logprobs": 3, "temperature": 2.0, "do_sample": True, "seed": 4, "logit_bias": {8: 2.0}}
    asked = with_sampling(plain, **changed)
    found = small.answers(small.engine(max_batch_size=3), [plain, asked])
    answer = small.engine().answer(asked)
    assert answer.token_ids == found[1]

    ids = torch.tensor([[*asked.input_ids, *answer.token_ids]])
    pixels = torch.cat([item.inputs["pixel_values"] for item in asked.media])
    logits = small.model(input_ids=ids, pixel_values=pixels).logits[0, len(asked.input_ids) - 1 : -1]
    expected = logits.float().log_softmax(-1)
    assert len(answer.logprobs) == len(answer.token_ids) == 6
    for row, token_id, said in zip(expected, answer.token_ids, answer.logprobs, strict=True):
        assert said.token_id == token_id
        assert said.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
        values, best = row.topk(3)
        assert [token for token, _ in said.top] == best.tolist()
        assert [value for _, value in said.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_each_row_gets_as_many_logprobs_as_it_asks_for(small):
    base = small.request(small.ids(1, 9), max_new_tokens=3)
    requests = [with_sampling(base, logprobs=count) for count in (None, 0, 5, 20)]
    for deltas, count in zip(finished(small.engine(max_batch_size=4), *requests), (None, 0, 5, 20), strict=True):
        for delta in deltas:
            assert len(delta.logprobs) == (0 if count is None else len(delta.token_ids))
            assert all(len(said.top) == count and said.logprob <= 0 for said in delta.logprobs)


def test_bias_decides(small):
    requests = [
        with_sampling(small.request(small.ids(seed, 9), max_new_tokens=4), logit_bias={200 + seed: 1000.0})
        for seed in range(3)
    ]
    answers = small.answers(small.engine(max_batch_size=3), requests)
    assert answers == [(200 + seed,) * 4 for seed in range(3)]
    with pytest.raises(MMToolError, match="logit_bias"):
        small.engine().answer(with_sampling(requests[0], logit_bias={small.vocabulary: 1.0}))


def test_no_stop_id_before_the_least_number_of_tokens(small):
    plain = small.request(small.ids(1, 30), max_new_tokens=9)
    first = small.generated(plain)[2]
    stopping = dataclasses.replace(plain, stop_token_ids=(first,))
    assert len(small.engine().answer(stopping).token_ids) == 3
    answer = small.engine().answer(with_sampling(stopping, min_new_tokens=6))
    assert len(answer.token_ids) >= 6
    assert first not in answer.token_ids[:5]


def test_no_stop_text_before_the_least_number_of_tokens(small):
    plain = small.request(small.ids(1, 30), max_new_tokens=9, strip=False)
    text = small.tokenizer.decode(small.generated(plain)[:2])
    stopping = dataclasses.replace(plain, stop_words=(text.strip()[0],))
    assert len(small.engine().answer(stopping).token_ids) < 6
    answer = small.engine().answer(with_sampling(stopping, min_new_tokens=6))
    assert len(answer.token_ids) >= 6
    assert answer.text.startswith(small.tokenizer.decode(answer.token_ids[:4]))


def test_benches_can_go_past_the_end(small):
    plain = small.request(small.ids(1, 30), max_new_tokens=9, strip=False)
    ids = small.generated(plain)
    text = small.tokenizer.decode(ids)
    ending = dataclasses.replace(plain, stop_token_ids=(ids[3],), stop_words=(text[:2],))
    assert len(small.engine().answer(ending).token_ids) < 4
    answer = small.engine().answer(with_sampling(ending, ignore_eos=True))
    assert (answer.token_ids, answer.text, answer.finish_reason) == (ids, text, "length")


def test_placeholders_need_not_be_tokens(small):
    """Wherever features stand; the repetition penalty does not look at them either."""
    plain = small.request(small.ids(1, 5), small.picture(1), small.ids(2, 5))
    ids = [small.vocabulary + 7 if token == small.image_token else token for token in plain.input_ids]
    other = dataclasses.replace(plain, input_ids=ids)
    assert small.engine().answer(other).token_ids == small.generated(plain)
    answer = small.engine().answer(with_sampling(other, repetition_penalty=1.2))
    assert answer.token_ids == small.engine().answer(with_sampling(plain, repetition_penalty=1.2)).token_ids


# -- grammar ---------------------------------------------------------------------------------------------------------


class Steps:
    """Allows one set of tokens after the other."""

    def __init__(self, steps, vocabulary, fail_at=None):
        self.steps, self.vocabulary, self.fail_at = steps, vocabulary, fail_at
        self.taken = []

    @property
    def finished(self):
        return len(self.taken) == len(self.steps)

    def allowed(self):
        if len(self.taken) == self.fail_at:
            raise RuntimeError("broken grammar")
        mask = [0] * math.ceil(self.vocabulary / 32)
        for token in self.steps[len(self.taken)]:
            mask[token // 32] |= 1 << (token % 32)
        return torch.tensor(mask, dtype=torch.int64).to(torch.int32)

    def accept(self, token_id):
        assert token_id in self.steps[len(self.taken)]
        self.taken.append(token_id)


def test_grammar_says_what_may_come_and_when_it_ends(small):
    steps = [[3, 31], [32, 63, 700], [1087], [5, 6, 7]]
    grammars = [Steps(steps, small.vocabulary) for _ in range(2)]
    plain = small.request(small.ids(1, 30), max_new_tokens=9)
    greedy = dataclasses.replace(plain, grammar=grammars[0])
    drawn = with_sampling(dataclasses.replace(plain, grammar=grammars[1]), do_sample=True, seed=1, temperature=50.0)
    deltas = finished(small.engine(max_batch_size=3), greedy, plain, drawn)
    assert [len(ids_of(found)) for found in deltas] == [4, 9, 4]
    assert [found[-1].finish_reason for found in deltas] == ["stop", "length", "stop"]
    for found, grammar in zip(deltas[::2], grammars, strict=True):
        assert list(ids_of(found)) == grammar.taken
    assert ids_of(deltas[1]) == small.generated(plain)


def test_failing_grammar_fails_its_request_alone(small):
    plain = [small.request(small.ids(seed, 10 + seed), max_new_tokens=9) for seed in range(4)]
    empty = dataclasses.replace(plain[0], grammar=Steps([[1], [2], []], small.vocabulary))
    broken = dataclasses.replace(plain[1], grammar=Steps([[1]] * 5, small.vocabulary, fail_at=0))
    later = dataclasses.replace(plain[1], grammar=Steps([[1]] * 5, small.vocabulary, fail_at=3))
    deltas = finished(small.engine(max_batch_size=8), plain[2], empty, broken, plain[3], later)
    assert [ids_of(found) for found in deltas] == [
        small.generated(plain[2]), (1, 2), (), small.generated(plain[3]), (1, 1, 1),
    ]  # fmt: skip
    assert [found[-1].finish_reason for found in deltas] == ["length", "error", "error", "length", "error"]
    assert "no token" in str(deltas[1][-1].error)


# -- coming and going ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["waiting", "filling", "answering", "finished"])
def test_cancelled_in_any_state_frees_its_slot_before_the_next_step(small, state, monkeypatch):
    monkeypatch.setattr("mmtool.engine.pt.PREFILL_ALONE", 8)
    engine = small.engine(max_batch_size=2, prefill_chunk=8)
    others = [small.request(small.ids(seed, 4), max_new_tokens=30) for seed in (1, 2)]
    victim = small.request(small.ids(3, 20), small.picture(1), max_new_tokens=12)
    deltas, beside = [], []
    engine.submit(others[0], beside.append)
    if state == "waiting":
        engine.submit(others[1], beside.append)
    run = engine.submit(victim, deltas.append)
    for _ in range({"waiting": 3, "filling": 2, "answering": 10, "finished": 40}[state]):
        engine.step()
    seen = {"waiting": run in engine._waiting, "filling": run in engine._filling, "finished": run.finished}
    assert seen.get(state, bool(run.token_ids) and not run.finished)
    engine.cancel(run)
    engine.cancel(run)
    assert run.finished and run not in [slot.run for slot in engine.slots]
    assert [delta.finish_reason for delta in deltas].count("cancelled") == (state != "finished")
    assert sum(delta.finish_reason is not None for delta in deltas) == 1
    if state != "finished":
        assert deltas[-1].usage.completion_tokens == len(ids_of(deltas))
        assert deltas[-1].usage.time_to_first_token >= 0
    again = []
    engine.submit(victim, again.append)
    while engine.busy:
        engine.step()
    assert ids_of(again) == small.generated(victim)
    assert ids_of([delta for delta in beside if delta.request is others[0]]) == small.generated(others[0])


def test_running_answers_get_a_token_in_every_step_while_a_long_prompt_is_computed(small):
    engine = small.engine(max_batch_size=4, prefill_chunk=16)
    deltas = []
    first = small.request(small.ids(1, 5), max_new_tokens=60)
    engine.submit(first, deltas.append)
    engine.step()
    late = []
    for seed in (2, 3):
        engine.submit(small.request(small.ids(seed, 200), small.picture(seed)), late.append)
    while not late:
        computed, count, towers = engine.stats.prefill_tokens, len(deltas), engine.stats.vision_calls
        engine.step()
        assert len(deltas) == count + 1
        assert engine.stats.prefill_tokens - computed <= 16
        assert engine.stats.vision_calls - towers <= 1
    assert len(deltas) >= 2 * 216 // 16 / 2
    while engine.busy:
        engine.step()
    assert ids_of(deltas) == small.generated(first)


def test_what_can_never_run_is_refused_at_once(small):
    engine = small.engine()
    with pytest.raises(MMToolError, match="positions"):
        engine.submit(small.request(small.ids(1, small.max_model_len)), print)
    with pytest.raises(MMToolError, match="adapter"):
        engine.submit(dataclasses.replace(small.request(small.ids(1, 5)), adapter="none"), print)
    for token in (-1, small.vocabulary):
        with pytest.raises(MMToolError, match=f"token {token} at position 2"):
            engine.submit(small.request([5, 6, token, 7]), print)
    assert not engine.busy
