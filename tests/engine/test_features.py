import torch

from mmtool.engine.features import FeatureCache

KILOBYTE = torch.zeros(16, 16)


def test_the_least_recently_used_features_make_room():
    cache = FeatureCache(3 * 1024)
    for key in "abc":
        cache.put(key, KILOBYTE)
    assert cache.get("a") is KILOBYTE
    cache.put("d", KILOBYTE)
    assert [key for key in "abcd" if key in cache] == ["a", "c", "d"]
    assert cache.num_bytes == 3 * 1024


def test_larger_features_take_the_place_of_several():
    cache = FeatureCache(3 * 1024)
    for key in "abc":
        cache.put(key, KILOBYTE)
    cache.put("d", torch.zeros(32, 16))
    assert [key for key in "abcd" if key in cache] == ["c", "d"]


def test_what_is_larger_than_the_cache_is_not_kept():
    cache = FeatureCache(1000)
    cache.put("a", KILOBYTE)
    assert len(cache) == cache.num_bytes == 0


def test_the_same_key_again_counts_once():
    cache = FeatureCache(4096)
    cache.put("a", KILOBYTE)
    cache.put("a", KILOBYTE)
    assert (len(cache), cache.num_bytes) == (1, 1024)


def test_engine_keeps_within_its_bound(small):
    engine = small.engine(feature_cache_bytes=2 * small.image_length * 64 * 4)
    for seed in range(5):
        asked = small.request(small.picture(seed), small.ids(seed, 3))
        assert engine.answer(asked).token_ids == small.generated(asked)
    assert len(engine.features) == 2
    engine.clear()
    engine.answer(small.request(small.picture(4), small.ids(0, 3)))
    assert engine.stats.vision_runs == 5
    engine.answer(small.request(small.picture(0), small.ids(0, 3)))
    assert engine.stats.vision_runs == 6


def test_more_pictures_in_one_prompt_than_the_cache_holds(small):
    engine = small.engine(feature_cache_bytes=0)
    asked = small.request(*map(small.picture, range(3)), small.ids(0, 3))
    assert engine.answer(asked).token_ids == small.generated(asked)
