import threading
import time

import pytest

from mmtool.infer.prefetch import Prefetch


def test_items_come_in_order_and_the_end_stays_the_end():
    with Prefetch(iter(range(100)), 3) as items:
        assert list(items) == list(range(100))
        assert list(items) == []


def test_no_more_items_are_made_than_asked_for():
    made = []
    with Prefetch((made.append(i) or i for i in range(100)), 4) as items:
        next(items)
        time.sleep(0.3)
        assert len(made) <= 1 + 4 + 1  # taken, waiting, and the one that finds no room


def test_an_error_is_raised_where_its_item_would_come():
    def items():
        yield 1
        raise ValueError("bad item")

    with Prefetch(items(), 3) as prefetch:
        assert next(prefetch) == 1
        with pytest.raises(ValueError, match="bad item"):
            next(prefetch)


def test_closing_early_ends_the_thread():
    before = threading.active_count()
    with Prefetch(iter(int, 1), 3) as items:
        next(items)
    assert threading.active_count() == before
