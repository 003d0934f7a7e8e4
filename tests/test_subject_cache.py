import copy
import pickle
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers_ssr.subject_cache import SubjectCache, digest, version
from torch import nn


def test_what_was_asked_for_longest_ago_goes_first():
    cache = SubjectCache(2)
    cache.keep("a", 1)
    cache.keep("b", 2)
    assert cache.get("a") == 1
    cache.keep("c", 3)
    assert [cache.get(key) for key in "abc"] == [1, None, 3]
    cache.keep("a", 4)
    cache.keep("d", 5)
    assert [cache.get(key) for key in "acd"] == [4, None, 5]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_begins_empty(duplicate):
    cache = SubjectCache(3)
    cache.keep("a", 1)
    other = duplicate(cache)
    assert (other.size, other.get("a"), cache.get("a")) == (3, None, 1)
    other.keep("a", 2)
    assert cache.get("a") == 1


class Slow(OrderedDict):
    """Lets other threads run between a look-up and what follows it."""

    def get(self, key):
        entry = super().get(key)
        time.sleep(1e-4)
        return entry


def test_threads_may_share_a_cache():
    """A small cache, so that entries go while others are asked for."""
    cache = SubjectCache(2)
    cache.entries = Slow()

    def work(thread: int) -> None:
        for step in range(50):
            key = (thread + step) % 5
            assert cache.get(key) in (None, key)
            cache.keep(key, key)

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(work, range(8)))) == 8
    assert len(cache.entries) == 2


def test_a_digest_is_that_of_the_content():
    tensor = torch.randn(3, 4)
    assert digest(tensor) == digest(tensor.clone()) == digest(tensor.t().contiguous().t())
    assert digest(tensor) != digest(tensor + 1)
    assert digest(tensor) != digest(tensor.bfloat16())
    assert digest(None) == b""


def test_a_version_tells_modules_weights_and_precisions_apart():
    module = nn.Linear(2, 2)
    first = version(module)
    assert version(module) == first != version(copy.deepcopy(module))
    with torch.no_grad():
        module.weight.mul_(2)
    changed = version(module)
    assert changed != first
    assert version(module.half()) not in (first, changed)


def test_threads_agree_on_a_modules_identity():
    modules = [nn.Linear(1, 1) for _ in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: [version(module)[0] for module in modules], range(8)))
    assert all(each == found[0] for each in found)
