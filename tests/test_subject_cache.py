import copy
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import call_args, make_picture
from diffusers.training_utils import EMAModel
from diffusers_ssr import SSREncoder
from diffusers_ssr.subject_cache import SubjectCache, digest, version
from torch import nn


def test_the_least_recently_used_entry_is_removed_first():
    cache = SubjectCache(2)
    cache.keep("a", 1)
    cache.keep("b", 2)
    assert cache.get("a") == 1
    cache.keep("c", 3)
    assert [cache.get(key) for key in "abc"] == [1, None, 3]
    cache.keep("a", 4)
    cache.keep("d", 5)
    assert [cache.get(key) for key in "acd"] == [4, None, 5]


class Slow(OrderedDict):
    """A dict that lets other threads run after a lookup."""

    def get(self, key):
        entry = super().get(key)
        time.sleep(1e-4)
        return entry


def test_threads_can_share_a_cache():
    """The cache is small, so that entries are removed while others are looked up."""
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


def test_a_digest_depends_on_the_content():
    tensor = torch.randn(3, 4)
    assert digest(tensor) == digest(tensor.clone()) == digest(tensor.t().contiguous().t())
    assert digest(tensor) != digest(tensor + 1)
    assert digest(tensor) != digest(tensor.bfloat16())
    assert digest(None) == b""


def test_a_version_depends_on_module_weights_and_dtype():
    module = nn.Linear(2, 2)
    first = version(module)
    assert version(module) == first != version(copy.deepcopy(module))
    with torch.no_grad():
        module.weight.mul_(2)
    changed = version(module)
    assert changed != first
    assert version(module.half()) not in (first, changed)


def _ema(module: nn.Module) -> None:
    average = EMAModel(module.parameters())
    average.shadow_params = [each + 1 for each in average.shadow_params]
    average.copy_to(module.parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.weight.data.mul_(2),
        lambda module: setattr(module.bias, "data", module.bias.data + 1),
        lambda module: module.load_state_dict({name: each + 1 for name, each in module.state_dict().items()}),
        _ema,
    ],
)
def test_a_version_depends_on_weights_that_are_changed_without_autograd(change):
    module = nn.Linear(20, 20)
    first = version(module)
    change(module)
    assert version(module) != first


def test_a_version_depends_on_adapters():
    peft = pytest.importorskip("peft", reason="adapters of peft")
    model = nn.Sequential(nn.Linear(4, 4))
    without = version(model)
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, model)
    on = version(model)
    model[0].enable_adapters(False)
    off = version(model)
    model[0].enable_adapters(True)
    model[0].set_scale("default", 0.5)
    assert len({without, on, off, version(model)}) == 4


def test_threads_get_the_same_identifier_of_a_module():
    modules = [nn.Linear(1, 1) for _ in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: [version(module)[0] for module in modules], range(8)))
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("component", ["ssr_encoder", "ssr_image_encoder"])
def test_another_precision_is_another_entry(pipe, component):
    """Also if the weights have the same values in both precisions."""
    module = getattr(pipe, component)
    module.half().float()
    first = pipe.encode_subject(make_picture(), "cat").subjects[0].embeds
    module.half()
    other = pipe.encode_subject(make_picture(), "cat").subjects[0].embeds
    assert other.dtype == pipe.ssr_encoder.dtype and not torch.equal(other.float(), first)


def test_fingerprints_are_computed_on_the_device_of_the_pipeline(pipe, monkeypatch):
    """With offloading, the encoder is on another device until it is used."""
    fingerprint, devices = SSREncoder.fingerprint, []
    monkeypatch.setattr(SSREncoder, "fingerprint", lambda self, *on: devices.append(on) or fingerprint(self, *on))
    subject = pipe.encode_subject(make_picture(), "cat")
    pipe(**call_args(subject=subject))
    assert len(devices) == 2 and set(devices) == {(pipe._execution_device,)}
