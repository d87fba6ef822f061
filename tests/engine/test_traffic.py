"""Random traffic: whoever comes, goes or shares a beginning, every answer is that of ``generate``."""

import copy
import dataclasses
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mmtool.engine.base import Sampling


@pytest.fixture(scope="module")
def prompts(small):
    """Prompts that begin alike in groups, with and without pictures; beside each, its answer of 30 tokens."""
    found = []
    for number in range(14):
        parts = [small.ids(100 + number % 3, 20 + 5 * (number % 3))]
        parts += [small.picture(number % 4)] * (number % 2)
        parts += [small.ids(200 + number % 5, 3 + 4 * (number % 5))]
        parts += [small.picture(5)] * (number % 5 == 0)
        parts += [small.ids(number, 1 + 3 * number)] * (number % 3 == 0)
        found.append((parts, small.generated(small.request(*parts, max_new_tokens=30))))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic(small, prompts, monkeypatch, seed):
    monkeypatch.setattr("mmtool.engine.slotted.ROOM_AHEAD", 8)
    monkeypatch.setattr("mmtool.engine.slotted.CAPACITY_STEP", 16)
    choose = random.Random(seed)
    monkeypatch.setattr("mmtool.engine.pt.PREFILL_ALONE", choose.choice([3, 2048]))
    engine = small.engine(
        max_batch_size=choose.choice([1, 2, 3, 5, 8]),
        prefill_chunk=choose.choice([3, 11, 2048]),
        feature_cache_bytes=choose.choice([0, 10_000, 10**8]),
        preallocate=choose.choice([True, False]),
    )
    running = []
    finished = 0
    for _ in range(150):
        action = choose.random()
        if action < 0.25 and len(running) < 12:
            parts, answer = choose.choice(prompts)
            length = choose.randrange(1, 31)
            deltas = []
            run = engine.submit(small.request(*parts, max_new_tokens=length), deltas.append)
            running.append((run, deltas, answer[:length]))
        elif action < 0.32 and running:
            run, deltas, answer = running.pop(choose.randrange(len(running)))
            engine.cancel(run)
            ids = sum((delta.token_ids for delta in deltas), ())
            assert ids == answer[: len(ids)]
        else:
            engine.step()
        for _, deltas, answer in [entry for entry in running if entry[0].finished]:
            assert sum((delta.token_ids for delta in deltas), ()) == answer
            finished += 1
        running = [entry for entry in running if not entry[0].finished]
        assert_consistent(engine)
    assert finished


def assert_consistent(engine):
    """Every slot knows its row and what may be written in it; the rest of the storage is zero."""
    for row, slot in enumerate(engine.slots):
        assert slot.row == row
        assert slot.written >= len(slot.tokens)
        for tensor in (*engine.kv.keys, *engine.kv.values):
            assert tensor is None or not tensor[row : row + 1, :, slot.written :].any()


@pytest.fixture(scope="module")
def adapters(small, tmp_path_factory):
    """Two adapters: of the decoder, and of the tower as well."""
    root = tmp_path_factory.mktemp("adapters")
    folders = {}
    for name, targets in (("decoder", r".*language_model.*(q_proj|down_proj)"), ("all", r".*(v_proj|fc1|up_proj)")):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(len(name))
            adapted = get_peft_model(copy.deepcopy(small.model), LoraConfig(r=2, target_modules=targets))
            for weight_name, weight in adapted.named_parameters():
                if ".lora_B." in weight_name:
                    weight.normal_(0, 0.3)
        folders[name] = root / name
        adapted.save_pretrained(str(folders[name]))
    return folders


@pytest.mark.parametrize("seed", range(4))
def test_random_requests_of_all_kinds(small, prompts, adapters, monkeypatch, seed):
    """Settings, adapters and bad pictures mixed; what is answered is what would be answered alone."""
    monkeypatch.setattr("mmtool.engine.slotted.ROOM_AHEAD", 8)
    monkeypatch.setattr("mmtool.engine.slotted.CAPACITY_STEP", 16)
    monkeypatch.setattr("mmtool.engine.pt.PREFILL_ALONE", 40)
    choose = random.Random(seed)

    def request():
        parts, _ = choose.choice(prompts)
        sampling = Sampling(
            max_new_tokens=choose.randrange(1, 15),
            do_sample=choose.random() < 0.5,
            seed=choose.randrange(100),
            temperature=choose.choice([0.5, 1.0, 1.5]),
            top_p=choose.choice([1.0, 0.9]),
            top_k=choose.choice([0, 20]),
            min_p=choose.choice([0.0, 0.02]),
            repetition_penalty=choose.choice([1.0, 1.0, 1.2]),
            presence_penalty=choose.choice([0.0, 0.0, 0.7]),
            logit_bias=choose.choice([{}, {}, {33: 2.0}]),
            logprobs=choose.choice([None, 2]),
        )
        found = small.request(*parts, sampling=sampling)
        return dataclasses.replace(found, adapter=choose.choice([None, *adapters]))

    alone = small.engine(small.network(), adapters=adapters, reuse_prefix=False)
    options = {"preallocate": seed % 2 == 0, "max_model_len": 400, "prefill_chunk": 16, "feature_cache_bytes": 20_000}
    engine = small.engine(small.network(), max_batch_size=6, adapters=adapters, **options)
    running, ended = [], 0
    for _ in range(110):
        action = choose.random()
        if action < 0.3 and len(running) < 9:
            asked = request()
            broken = bool(asked.media) and choose.random() < 0.15
            if broken:
                bad = dataclasses.replace(asked.media[0], inputs={"pixel_values": torch.zeros(1, 3, 8, 8)}, key="bad0")
                asked.media[0] = bad
            deltas = []
            running.append((engine.submit(asked, deltas.append), deltas, broken))
        elif action < 0.36 and running:
            engine.cancel(choose.choice(running)[0])
        else:
            engine.step()
        for run, deltas, broken in [entry for entry in running if entry[0].finished]:
            ended += 1
            ids = sum((delta.token_ids for delta in deltas), ())
            reason = deltas[-1].finish_reason
            if broken:
                assert reason in ("error", "cancelled") and not ids
                continue
            expected = alone.answer(run.request)
            assert ids == expected.token_ids[: len(ids)]
            if reason != "cancelled":
                assert (len(ids), reason) == (len(expected.token_ids), expected.finish_reason)
                assert "".join(delta.text for delta in deltas) == expected.text
        running = [entry for entry in running if not entry[0].finished]
        assert_consistent(engine)
    assert ended > 5
