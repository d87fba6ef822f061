"""The engine against ``generate``, and what it must not compute twice."""

import dataclasses
import weakref

import pytest
import torch

from mmtool.engine.base import Delta, Sampling
from mmtool.engine.slots import KVSlots
from mmtool.errors import MMToolError, TooLongError


@pytest.fixture
def mixed(small):
    """Requests of all kinds, each of another length and with another number of new tokens."""
    ids, picture = small.ids, small.picture
    return [
        small.request(ids(1, 30), picture(1), ids(2, 7), max_new_tokens=9),
        small.request(ids(3, 4), max_new_tokens=21),
        small.request(picture(2), picture(3), ids(4, 50), max_new_tokens=1),
        small.request(ids(5, 70), max_new_tokens=6),
        small.request(ids(6, 2), picture(1), ids(7, 30), picture(4), max_new_tokens=14),
        small.request(ids(8, 1), max_new_tokens=5),
        small.request(ids(9, 40), picture(2), max_new_tokens=11),
    ]


@pytest.mark.parametrize("max_batch_size", [1, 3, 8])
def test_greedy_answers_are_those_of_generate_whoever_joins_or_leaves(small, mixed, max_batch_size):
    engine = small.engine(max_batch_size=max_batch_size)
    assert small.answers(engine, mixed) == [small.generated(request) for request in mixed]
    assert small.answers(engine, mixed) == [small.generated(request) for request in mixed]  # from kept slots too


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy_answers_are_those_of_generate_through_the_models_own_forward(small, mixed, attention):
    model = small.network(attention)
    model.model.language_model.norm.register_forward_hook(lambda *_: None)  # so LlamaStep does not fit
    engine = small.engine(model, max_batch_size=3)
    assert small.answers(engine, mixed) == [small.generated(request, model) for request in mixed]
    assert engine._step is None


def test_prompts_computed_in_parts_give_the_same(small, mixed, monkeypatch):
    monkeypatch.setattr("mmtool.engine.pt.PREFILL_ALONE", 5)
    engine = small.engine(max_batch_size=3, prefill_chunk=5)  # parts end inside pictures
    assert small.answers(engine, mixed) == [small.generated(request) for request in mixed]


def test_answers_do_not_depend_on_prefix_reuse(small, mixed):
    shared = small.ids(20, 60)
    requests = [small.request(shared, request.input_ids[:9], max_new_tokens=6) for request in mixed]
    engines = [small.engine(max_batch_size=2, reuse_prefix=reuse) for reuse in (False, True)]
    assert small.answers(engines[0], requests) == small.answers(engines[1], requests)
    assert engines[0].stats.cached_tokens == 0
    assert engines[1].stats.cached_tokens >= 60 * (len(requests) - 1)


def test_answer_longer_than_the_room_made_at_first(small, monkeypatch):
    monkeypatch.setattr("mmtool.engine.slotted.ROOM_AHEAD", 4)
    monkeypatch.setattr("mmtool.engine.slots.CAPACITY_STEP", 8)
    monkeypatch.setattr("mmtool.engine.slotted.CAPACITY_STEP", 8)
    requests = [small.request(small.ids(seed, 5 * seed), max_new_tokens=60) for seed in (1, 2, 3)]
    engine = small.engine(max_batch_size=2)
    assert small.answers(engine, requests) == [small.generated(request) for request in requests]
    assert engine.kv.capacity <= 80


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(small, mixed, dtype):
    model = small.network().to("cuda", dtype)
    answers = small.answers(small.engine(model, max_batch_size=3), mixed)
    assert [len(ids) for ids in answers] == [request.sampling.max_new_tokens for request in mixed]
    if dtype == torch.float32:  # less precise numbers make near ties
        assert answers == [small.generated(request) for request in mixed]


def test_text_model_without_media(small):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(small.model.config.text_config).eval()
    asked = small.request(small.ids(1, 12), max_new_tokens=10)
    assert small.engine(model).answer(asked).token_ids == small.generated(asked, model)


# -- what is not computed twice --------------------------------------------------------------------------------------


def follow_up(small, asked, answer, *parts, **fields):
    """The next turn of a chat: everything so far, then more."""
    more = small.request(*parts, **fields)
    shifted = [dataclasses.replace(item, start=item.start + len(asked.input_ids) + len(answer)) for item in more.media]
    return dataclasses.replace(
        more, input_ids=[*asked.input_ids, *answer, *more.input_ids], media=[*asked.media, *shifted]
    )


def test_second_turn_about_a_picture_computes_only_what_is_new(small):
    engine = small.engine()
    first = small.request(small.ids(1, 20), small.picture(1), small.ids(2, 10), max_new_tokens=7)
    answer = engine.answer(first)
    assert (engine.stats.vision_runs, engine.stats.prefill_tokens) == (1, 46)
    assert answer.usage.image_features_computed == 1

    second = follow_up(small, first, answer.token_ids, small.ids(3, 5))
    answer = engine.answer(second)
    assert engine.stats.vision_runs == 1
    assert engine.stats.prefill_tokens == 46 + 1 + 5  # the last token of the answer was never fed
    assert answer.usage.cached_tokens == len(second.input_ids) - 6
    assert answer.usage.image_features_computed == 0
    assert answer.token_ids == small.generated(second)


def test_picture_in_the_second_turn(small):
    engine = small.engine()
    first = small.request(small.ids(1, 20), max_new_tokens=7)
    answer = engine.answer(first)
    second = follow_up(small, first, answer.token_ids, small.ids(2, 3), small.picture(1), small.ids(3, 5))
    assert engine.answer(second).token_ids == small.generated(second)
    assert engine.stats.vision_runs == 1
    assert engine.stats.prefill_tokens == 20 + 1 + 3 + small.image_length + 5


def test_edited_history_goes_on_from_the_common_prefix(small):
    engine = small.engine()
    first = small.request(small.ids(1, 20), small.picture(1), small.ids(2, 10))
    engine.answer(first)
    before = engine.stats.prefill_tokens
    edited = small.request(small.ids(1, 20), small.picture(1), small.ids(2, 6), small.ids(9, 8))
    assert engine.answer(edited).token_ids == small.generated(edited)
    assert engine.stats.prefill_tokens - before == 8
    assert engine.stats.vision_runs == 1


def test_another_picture_in_the_same_place_is_another_prompt(small):
    engine = small.engine()
    for seed in (1, 2):
        asked = small.request(small.ids(1, 20), small.picture(seed), small.ids(2, 10))
        assert engine.answer(asked).token_ids == small.generated(asked)
    assert engine.stats.vision_runs == 2
    assert engine.stats.cached_tokens == 20


def test_asking_the_same_again_computes_one_position(small):
    engine = small.engine()
    asked = small.request(small.picture(1), max_new_tokens=3)
    engine.answer(asked)
    before = engine.stats.prefill_tokens
    again = engine.answer(asked)
    assert engine.stats.prefill_tokens - before == 1  # inside the picture: its features are needed, its tower is not
    assert engine.stats.vision_runs == 1
    assert engine.stats.feature_hits == 1
    assert again.token_ids == small.generated(asked)


def test_picture_seen_before_the_conversations_were_forgotten(small):
    engine = small.engine()
    asked = small.request(small.ids(1, 5), small.picture(1), small.ids(2, 5))
    engine.answer(asked)
    engine.clear()
    assert engine.kv.num_bytes == 0
    assert engine.answer(asked).token_ids == small.generated(asked)
    assert (engine.stats.vision_runs, engine.stats.feature_hits, engine.stats.cached_tokens) == (1, 1, 0)
    engine.clear(features=True)
    engine.answer(asked)
    assert engine.stats.vision_runs == 2


def test_questions_about_one_picture_share_it_though_they_come_together(small):
    engine = small.engine(max_batch_size=4)
    start = small.ids(1, 20), small.picture(1)
    requests = [small.request(*start, small.ids(seed, 5)) for seed in (2, 3, 4, 5)]
    assert small.answers(engine, requests) == [small.generated(request) for request in requests]
    assert (engine.stats.vision_calls, engine.stats.vision_runs) == (1, 1)
    assert engine.stats.prefill_tokens == 36 + 4 * 5


def test_pictures_of_several_requests_go_through_the_tower_together(small):
    engine = small.engine(max_batch_size=4)
    requests = [small.request(small.picture(seed), small.ids(seed, 5)) for seed in (1, 2, 3)]
    small.answers(engine, requests)
    assert (engine.stats.vision_calls, engine.stats.vision_runs) == (1, 3)


def test_long_conversation_survives_another_that_begins_alike(small):
    engine = small.engine(max_batch_size=2)
    system = small.ids(1, 10)
    long = small.request(system, small.ids(2, 100))
    answer = engine.answer(long)
    other = small.request(system, small.ids(3, 20))
    assert engine.answer(other).token_ids == small.generated(other)
    assert engine.stats.cached_tokens == 10
    second = follow_up(small, long, answer.token_ids, small.ids(4, 5))
    assert engine.answer(second).token_ids == small.generated(second)
    assert engine.stats.cached_tokens == 10 + 110 + 7


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_prefix_of_a_request_that_is_still_answering(small, steps):
    engine = small.engine(max_batch_size=2)
    start = small.ids(1, 20), small.picture(1), small.ids(2, 6)
    first = small.request(*start, max_new_tokens=12)
    second = small.request(*start, small.ids(3, 7), small.picture(2), max_new_tokens=12)
    found = [[], []]
    engine.submit(first, found[0].append)
    for _ in range(steps):
        engine.step()
    engine.submit(second, found[1].append)
    while engine.busy:
        engine.step()
    assert [sum((delta.token_ids for delta in deltas), ()) for deltas in found] == [
        small.generated(first), small.generated(second),
    ]  # fmt: skip
    assert [deltas[-1].usage.cached_tokens for deltas in found] == [0, 42]
    assert [deltas[-1].usage.image_features_computed for deltas in found] == [1, 1]
    assert engine.stats.prefill_tokens == 42 + 7 + 16


def test_oldest_conversation_makes_room(small):
    engine = small.engine(max_batch_size=2)
    chats = [small.request(small.ids(seed, 20)) for seed in (1, 2, 3)]
    for chat in chats:
        engine.answer(chat)
    engine.answer(chats[1])
    assert engine.stats.cached_tokens == 19
    engine.answer(chats[0])
    assert engine.stats.cached_tokens == 19
    assert len(engine.slots) == 2


# -- coming and going ------------------------------------------------------------------------------------------------


def test_requests_are_pulled_only_when_there_is_room(small):
    pulled = []

    def source():
        for seed, length in enumerate((3, 20, 3, 3)):
            pulled.append(seed)
            yield small.request(small.ids(seed, 5), max_new_tokens=length)

    finished = []
    for delta in small.engine(max_batch_size=2).generate(source()):
        if delta.finish_reason:
            finished.append(delta.index)
        assert len(pulled) - len(finished) <= 2
    assert finished == [0, 2, 3, 1]


def test_closed_in_the_middle_keeps_what_was_computed(small):
    engine = small.engine()
    asked = small.request(small.ids(1, 30), small.picture(1), max_new_tokens=20)
    deltas = engine.generate([asked])
    begun = [next(deltas) for _ in range(6)]
    deltas.close()
    assert not engine.busy
    so_far = [token for delta in begun for token in delta.token_ids]
    second = follow_up(small, asked, so_far, small.ids(2, 5))
    before = engine.stats.prefill_tokens
    assert engine.answer(second).token_ids == small.generated(second)
    assert engine.stats.prefill_tokens - before == 1 + 5
    assert engine.stats.vision_runs == 1


@pytest.mark.parametrize(
    ("moment", "call"),
    [
        ("lm_head", 0),
        ("lm_head", 1),
        ("lm_head", 9),
        ("norm", 0),
        ("norm", 4),
        ("vision_tower", 0),
        ("vision_tower", 1),
    ],
)
def test_interrupted_at_any_moment_the_next_call_works(small, mixed, moment, call):
    model = small.network()
    calls = []

    def interrupt(*_):
        calls.append(None)
        if len(calls) == call + 1:
            raise KeyboardInterrupt

    part = {"lm_head": model.lm_head, "norm": model.model.language_model.norm, "vision_tower": model.model.vision_tower}
    part[moment].register_forward_pre_hook(interrupt)
    engine = small.engine(model, max_batch_size=3, prefill_chunk=8)
    with pytest.raises(KeyboardInterrupt):
        small.answers(engine, mixed)
    assert not engine.busy
    assert small.answers(engine, mixed) == [small.generated(request) for request in mixed]


def test_two_iterators_may_be_open(small):
    engine = small.engine(max_batch_size=2)
    asked = [small.request(small.ids(seed, 5 + seed), max_new_tokens=12) for seed in (1, 2)]
    one, other = (engine.generate([request]) for request in asked)
    ids = [], []
    for _ in range(12):
        ids[0].extend(next(one).token_ids)
        ids[1].extend(next(other).token_ids)
    assert [tuple(found) for found in ids] == [small.generated(request) for request in asked]


def test_waits_for_an_iterator_that_has_the_only_slot(small):
    engine = small.engine()
    asked = [small.request(small.ids(seed, 5), max_new_tokens=6) for seed in (1, 2)]
    one = engine.generate([asked[0]])
    first = next(one)
    assert engine.answer(asked[1]).token_ids == small.generated(asked[1])
    assert first.token_ids + sum((delta.token_ids for delta in one), ()) == small.generated(asked[0])


def test_engine_does_not_keep_the_model_alive(small):
    model = small.network()
    engine = small.engine(weakref.proxy(model))
    asked = small.request(small.picture(1), small.ids(1, 5))
    assert engine.answer(asked).token_ids == small.generated(asked)
    gone = weakref.ref(model)
    del model
    assert gone() is None


# -- ends and errors -------------------------------------------------------------------------------------------------


def test_last_delta_says_why_and_what_it_took(small):
    asked = small.request(small.ids(1, 30), max_new_tokens=5)
    *others, last = small.engine().generate([asked])
    assert all(delta.finish_reason is None and delta.usage is None for delta in others)
    assert last.finish_reason == "length"
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.cached_tokens) == (30, 5, 0)
    assert 0 < last.usage.time_to_first_token <= last.usage.seconds


def test_stop_id_ends_the_answer_and_is_among_its_ids(small):
    asked = small.request(small.ids(1, 30), max_new_tokens=9)
    ids = small.generated(asked)
    stop = ids[4]
    asked.stop_token_ids = (stop,)
    answer = small.engine().answer(asked)
    assert answer.token_ids == ids[: ids.index(stop) + 1]
    assert answer.finish_reason == "stop"
    assert answer.text == small.tokenizer.decode(ids[: ids.index(stop)]).strip()


def test_stop_word_ends_the_answer(small):
    asked = small.request(small.ids(1, 30), max_new_tokens=9)
    text = small.tokenizer.decode(small.generated(asked))
    word = text[len(text) // 2 : len(text) // 2 + 2]
    asked.sampling = dataclasses.replace(asked.sampling, stop=(word,))
    asked.strip = False
    answer = small.engine().answer(asked)
    assert answer.text == text[: text.index(word)]
    assert answer.finish_reason == "stop"
    assert len(answer.token_ids) < 9


def test_new_tokens_are_as_many_as_the_context_allows(small):
    length = small.max_model_len - 4
    answer = small.engine().answer(small.request(small.ids(1, length), max_new_tokens=100))
    assert (len(answer.token_ids), answer.finish_reason) == (4, "length")


@pytest.mark.parametrize("excess", [0, 1])
def test_too_long_a_prompt_is_an_error_with_both_numbers(small, excess):
    asked = small.request(small.ids(1, small.max_model_len + excess))
    with pytest.raises(TooLongError) as caught:
        small.engine().answer(asked)
    assert (caught.value.length, caught.value.limit) == (small.max_model_len + excess, small.max_model_len)
    assert str(caught.value.length) in caught.value.message and str(caught.value.limit) in caught.value.message


def test_limit_can_be_lowered_but_not_raised(small):
    engine = small.engine(max_model_len=40)
    assert len(engine.answer(small.request(small.ids(1, 36), max_new_tokens=100)).token_ids) == 4
    with pytest.raises(MMToolError, match="max_model_len"):
        small.engine(max_model_len=small.max_model_len + 1)


def broken_picture(small):
    return dataclasses.replace(small.picture(9), inputs={"pixel_values": torch.zeros(1, 3, 40, 40)})


def test_failing_request_raises_and_the_next_call_works(small):
    engine = small.engine()
    good = small.request(small.ids(1, 20), small.picture(1))
    engine.answer(good)
    with pytest.raises((MMToolError, ValueError, RuntimeError)):
        engine.answer(small.request(small.ids(1, 20), broken_picture(small), small.ids(2, 4)))
    assert not engine.busy
    assert engine.answer(good).token_ids == small.generated(good)


def test_failing_requests_leave_the_others_alone(small, mixed):
    bad = [
        small.request(small.ids(1, 20), broken_picture(small)),
        small.request(small.ids(1, small.max_model_len)),
        small.request(dataclasses.replace(small.picture(8), length=15), small.ids(1, 3)),
    ]
    requests = [mixed[0], bad[0], *mixed[1:3], bad[1], mixed[3], bad[2], *mixed[4:]]
    engine = small.engine(max_batch_size=3)
    answers: dict[int, list[Delta]] = {}
    for delta in engine.generate(requests, errors="yield"):
        answers.setdefault(delta.index, []).append(delta)
    for index, request in enumerate(requests):
        last = answers[index][-1]
        if any(request is other for other in bad):
            assert last.finish_reason == "error" and isinstance(last.error, Exception) and last.usage is None
        else:
            assert sum((delta.token_ids for delta in answers[index]), ()) == small.generated(request)


def test_failing_step_is_tried_again_row_by_row(small, mixed):
    model = small.network()
    steps = []

    def fail(module, args):
        steps.append(len(args[0]))
        if steps[-1] == 3 and steps.count(3) == 2:
            raise RuntimeError("out of memory, say")

    model.lm_head.register_forward_pre_hook(fail)
    engine = small.engine(model, max_batch_size=3)
    assert small.answers(engine, mixed) == [small.generated(request) for request in mixed]
    assert steps.count(3) > 2


def test_failing_row_fails_alone(small, mixed):
    """One answer comes to a token that nothing can go on from; no other has that token."""
    expected = [small.generated(request) for request in mixed]
    guilty, place = 4, 5
    poison = expected[guilty][place]
    seen = [token for index, request in enumerate(mixed) for token in (*request.input_ids, *expected[index])]
    assert seen.count(poison) == 1
    model = small.network()

    def fail(module, args, output):
        if (args[0] == poison).any():
            raise RuntimeError("this row")

    model.get_input_embeddings().register_forward_hook(fail)
    answers: dict[int, tuple[int, ...]] = {}
    failed = []
    engine = small.engine(model, max_batch_size=3)
    for delta in engine.generate(mixed, errors="yield"):
        answers[delta.index] = answers.get(delta.index, ()) + delta.token_ids
        failed += [delta.index] * (delta.error is not None)
    assert failed == [guilty]
    assert answers.pop(guilty) == expected[guilty][: place + 1]
    assert answers == {index: ids for index, ids in enumerate(expected) if index != guilty}


def test_numbers_gone_bad_stay_with_the_request_they_came_from(small):
    """A row of NaN lies in the slot of a request that is over; a shorter request there runs beside a longer one."""
    nan = dataclasses.replace(small.picture(1), inputs={"pixel_values": torch.full((1, 3, 56, 56), torch.nan)})
    engine = small.engine(max_batch_size=2)
    bad = [small.request(nan, small.ids(seed, 40)) for seed in (1, 2)]
    bad[1].sampling = Sampling(do_sample=True, seed=1, top_p=0.9)
    found = list(engine.generate(bad, errors="yield"))
    assert [type(delta.error) for delta in found] == [MMToolError] * 2
    assert all("not finite" in str(delta.error) for delta in found)
    good = [small.request(small.ids(3, 5)), small.request(small.ids(4, 50))]
    assert small.answers(engine, good) == [small.generated(request) for request in good]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("layer_types", ["full_attention", "linear_attention", "full_attention"], "linear_attention"),
        ("sliding_window", 100, "sliding_attention"),
        ("rope_parameters", {"rope_type": "default", "mrope_section": [2, 3, 3]}, "several position numbers"),
    ],
)
def test_models_with_other_than_full_attention_are_refused(small, field, value, named):
    model = small.network()
    setattr(model.config.text_config, field, value)
    with pytest.raises(MMToolError, match=named):
        small.engine(model)


def test_seeded_draws_do_not_depend_on_neighbours(small):
    def asked(seed):
        sampling = Sampling(max_new_tokens=15, do_sample=True, temperature=1.5, top_p=0.9, top_k=40, seed=seed)
        return small.request(small.ids(1, 20), sampling=sampling)

    alone = small.engine().answer(asked(7)).token_ids
    others = [small.request(small.ids(seed, 3 * seed), max_new_tokens=4 * seed) for seed in (2, 3, 4)]
    beside = small.answers(small.engine(max_batch_size=3), [*others[:2], asked(7), others[2], asked(8)])
    assert beside[2] == alone
    assert beside[4] != alone
    assert beside[0] == small.generated(others[0])


def test_draws_without_a_seed_follow_the_global_one(small):
    asked = small.request(small.ids(1, 20), sampling=Sampling(max_new_tokens=15, do_sample=True, temperature=2.0))
    found = []
    for seed in (2, 2, 3):
        torch.manual_seed(seed)
        found.append(small.engine().answer(asked).token_ids)
    assert found[0] == found[1] != found[2]


def test_repetition_penalty_is_that_of_generate(small):
    sampling = Sampling(max_new_tokens=20, repetition_penalty=1.7)
    requests = [small.request(small.ids(seed, 4 * seed), sampling=sampling) for seed in (3, 4)]
    plain = small.request(small.ids(5, 9), max_new_tokens=20)
    expected = []
    for request in requests:
        ids = torch.tensor([request.input_ids])
        out = small.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20,
            repetition_penalty=1.7, pad_token_id=0,
        )  # fmt: skip
        expected.append(tuple(out[0, ids.shape[1] :].tolist()))
    assert small.answers(small.engine(max_batch_size=3), [*requests, plain]) == [*expected, small.generated(plain)]


def test_a_prompt_that_does_not_fit_behind_another_is_computed_whole_in_the_next_step(small):
    engine = small.engine(max_batch_size=3, prefill_chunk=40)
    requests = [small.request(small.ids(seed, 30), max_new_tokens=20) for seed in range(3)]
    engine.submit(requests[0], lambda delta: None)
    engine.step()
    second, third = (engine.submit(request, lambda delta: None) for request in requests[1:])
    engine.step()
    assert second.token_ids and not third.token_ids and not third.slot.tokens
    engine.step()
    assert third.token_ids


def test_small_memory_for_conversations_is_touched_at_the_start(small, monkeypatch):
    zeroed = []
    zero = KVSlots.zero
    monkeypatch.setattr(KVSlots, "zero", lambda self, *which: zeroed.append(which) or zero(self, *which))
    engine = small.engine(max_batch_size=2, max_model_len=100, preallocate=True)
    assert (slice(None), 0, engine.kv.capacity) in zeroed
    zeroed.clear()
    monkeypatch.setattr("mmtool.engine.pt.TOUCHED_AT_ONCE", 0)
    small.engine(max_batch_size=2, max_model_len=100, preallocate=True)
    assert (slice(None), 0, engine.kv.capacity) not in zeroed
