import torch
from hypothesis import given
from hypothesis import strategies as st

from mmtool.engine.slots import KVSlots, common_prefix, content_keys


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_common_prefix(one, other):
    length = common_prefix(one, other)
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]


def test_positions_of_a_picture_are_known_by_its_content(small):
    asked = small.request([5, 6], small.picture(1), [7], small.picture(2))
    keys = content_keys(asked.input_ids, asked.media)
    assert keys[:2] + keys[18:19] == [5, 6, 7]
    assert len(set(keys[2:18])) == len(set(keys[19:])) == 1
    assert keys[2] != keys[19] and keys[2] < 0 and keys[19] < 0


def filled() -> KVSlots:
    kv = KVSlots(2)
    kv.reserve(2, 4, 0)
    for layer in range(2):
        keys, values = kv.layer(layer, torch.empty(1, 3, 1, 5), torch.empty(1, 3, 1, 2))
        keys.copy_(torch.arange(keys.numel()).view_as(keys))
        values.copy_(torch.arange(values.numel()).view_as(values))
    return kv


def test_rows_keep_their_content_when_there_is_more_room():
    kv = filled()
    before = [tensor.clone() for tensor in (*kv.keys, *kv.values)]
    kv.reserve(3, 9, 4)
    kv.reserve(1, 1, 4)  # never shrinks
    assert [tuple(tensor.shape) for tensor in (kv.keys[0], kv.values[1])] == [(3, 3, 9, 5), (3, 3, 9, 2)]
    for old, new in zip(before, (*kv.keys, *kv.values), strict=True):
        assert torch.equal(new[:2, :, :4], old)
        assert new.sum() == old.sum()  # the rest is zero


def test_copy_swap_and_zero():
    kv = filled()
    before = kv.keys[1].clone()
    kv.swap(0, 1, 3)
    assert torch.equal(kv.keys[1][0, :, :3], before[1, :, :3])
    assert torch.equal(kv.keys[1][1, :, :3], before[0, :, :3])
    assert torch.equal(kv.keys[1][:, :, 3:], before[:, :, 3:])
    kv.copy(0, 1, 2)
    assert torch.equal(kv.keys[1][1, :, :2], before[1, :, :2])
    kv.zero(0, 1, 3)
    assert kv.keys[1][0, :, 1:3].abs().sum() == 0
    assert torch.equal(kv.keys[1][0, :, :1], before[1, :, :1])
