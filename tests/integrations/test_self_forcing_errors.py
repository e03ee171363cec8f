"""What can not be patched, called or undone is refused by name, and leaves everything as it was."""

import types

import pytest
import torch

from inferix_kernels import OutOfPages, Unsupported
from inferix_kernels.integrations import self_forcing
from inferix_kernels.integrations.self_forcing.contract import CONTRACTS
from inferix_kernels.integrations.self_forcing.slots import Rules, Span, biases, place, read
from tests.integrations import wan_stand_ins as stand_ins
from tests.integrations.wan_stand_ins import FRAME, caches, tokens


@pytest.fixture
def module():
    yield stand_ins.self_forcing()
    self_forcing.unpatch()


def model_of(module, **options):
    return module.CausalWanModel(**options).requires_grad_(False)


def attributes(module):
    return module.CausalWanSelfAttention.forward, module.CausalWanModel._forward_inference


def test_a_patch_is_undone(module):
    before = attributes(module)
    patched = self_forcing.patch(module)
    assert str(patched) == (
        "stand_in.self_forcing (Self-Forcing, Causal-Forcing): "
        "CausalWanSelfAttention.forward, CausalWanModel._forward_inference"
    )
    assert not set(attributes(module)) & set(before)
    self_forcing.unpatch(module)
    assert attributes(module) == before


def test_without_a_cache_the_original_runs(module):
    model = model_of(module)
    expected = model(tokens(3, 0))
    self_forcing.patch(module)
    assert torch.equal(model(tokens(3, 0)), expected)


def test_a_module_is_patched_once(module):
    self_forcing.patch(module)
    with pytest.raises(ValueError, match="module must not be patched already, got stand_in"):
        self_forcing.patch(module)
    self_forcing.unpatch(module)
    with pytest.raises(ValueError, match="module must be one that was patched, got 'stand"):
        self_forcing.unpatch(module)


def test_what_another_tool_replaced_since_is_left_alone(module):
    other, functions = lambda *args: None, types.ModuleType("functions")
    functions.attention = self_forcing.attention
    self_forcing.patch(functions)
    self_forcing.patch(module)
    ours = attributes(module)
    module.CausalWanModel._forward_inference = other
    for undone in (module, None):
        with pytest.raises(ValueError, match=r"CausalWanModel\._forward_inference must be as patch left it"):
            self_forcing.unpatch(undone)
        assert attributes(module) == (ours[0], other)
    module.CausalWanModel._forward_inference = ours[1]
    self_forcing.unpatch()


def without(name):
    def change(module):
        delattr(module, name)

    return change


def another_forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, kv_bank=None):
    pass


def compressed(module):
    module.CausalWanSelfAttention.compress = lambda self: None


def renamed(module):
    module.CausalWanModel._forward_inference = lambda self, x, cache: None


@pytest.mark.parametrize(
    "change, error",
    [
        (without("CausalWanModel"), r"module must define CausalWanModel\._forward_inference"),
        (without("causal_rope_apply"), "module must have causal_rope_apply"),
        (lambda m: setattr(m.CausalWanSelfAttention, "forward", another_forward), "forward takes .*kv_bank"),
        (compressed, "with methods compress"),
        (renamed, r"must take kv_cache and current_start, got .*\('self', 'x', 'cache'\)"),
        (without("CausalWanSelfAttention"), "module must have CausalWanSelfAttention, or attention or flash_attention"),
    ],
)
def test_a_module_that_is_not_what_it_must_be(module, change, error):
    change(module)
    before = dict(vars(module)), dict(vars(getattr(module, "CausalWanSelfAttention", object)))
    with pytest.raises(ValueError, match=error):
        self_forcing.patch(module)
    assert before == (dict(vars(module)), dict(vars(getattr(module, "CausalWanSelfAttention", object))))


@pytest.mark.parametrize(
    "options, error",
    [
        ({"format": "int7"}, "format must be one of"),
        ({"worlds": 0}, "worlds must be at least 1"),
        ({"page_size": 12}, "page_size must be a positive multiple of 8"),
        ({"precision": "4bit"}, "precision must be"),
    ],
)
def test_options(module, options, error):
    with pytest.raises(ValueError, match=error):
        self_forcing.patch(module, **options)
    with pytest.raises(ValueError, match="module must be a Python module"):
        self_forcing.patch(stand_ins.Attention)
    self_forcing.patch(module)


def test_functions_of_another_signature_stay(module):
    functions = types.ModuleType("wan.modules.attention")
    functions.flash_attention, functions.attention = self_forcing.flash_attention, lambda q, k, v: q
    with pytest.raises(ValueError, match=r"attention\.attention must take q, k, v, q_lens, .* got q, k, v"):
        self_forcing.patch(functions)


def call(module, kv_cache, start=0, frames=3, **options):
    return model_of(module, **options)(tokens(frames, 0), kv_cache=kv_cache, current_start=start)


@pytest.mark.parametrize(
    "change, kind, error",
    [
        (lambda made: made[1].pop("k"), ValueError, "kv_cache must have k, as Self-Forcing"),
        (lambda made: made[0].pop("local_end_index"), ValueError, "kv_cache must have local_end_index"),
        (lambda made: made[1].update(v=[1]), ValueError, r"kv_cache\[1\]\['v'\] must be a tensor \[B, S, H, D\]"),
        (lambda made: made[1].update(v=made[1]["v"][:, 1:]), ValueError, r"kv_cache\[1\]\['v'\] must be as the first"),
        (lambda made: [c.update(k=c["k"].double(), v=c["v"].double()) for c in made], Unsupported, "torch.float64"),
        (lambda made: made.clear(), ValueError, r"kv_cache must be a list of a dict for each layer, got \[\]"),
    ],
)
def test_a_cache_that_is_not_what_it_must_be(module, change, kind, error):
    self_forcing.patch(module)
    made = caches(9)
    change(made)
    before = [dict(cache) for cache in made]
    with pytest.raises(kind, match=error):
        call(module, made)
    assert all(cache[name] is x for cache, old in zip(made, before) for name, x in old.items())


def test_caches_are_used_together_and_as_their_repository_says(module):
    self_forcing.patch(module)
    made = caches(9)
    call(module, made)
    for mixed in ([made[0], caches(9)[1]], [made[1], made[0]]):
        with pytest.raises(ValueError, match="kv_cache must be dicts that were made together"):
            call(module, mixed)
    with pytest.raises(ValueError, match=r"with B, H, D = \(1, 2, 16\), got \[2, 54, 2, 16\]"):
        call(module, caches(9, batch=2))
    with pytest.raises(ValueError, match="kv_cache must have come through the patched model"):
        model_of(module).layers[0](tokens(3, 0), None, torch.tensor([[3, 2, 3]]), torch.ones(8), None, caches(9)[0])
    causvid = stand_ins.causvid()
    self_forcing.patch(causvid)
    with pytest.raises(ValueError, match="kv_cache must not have global_end_index, local_end_index"):
        causvid.CausalWanModel()(tokens(3, 0), kv_cache=caches(9), current_end=3 * FRAME)
    with pytest.raises(ValueError, match="current_end must be 18, got 6"):
        model_of(causvid)(tokens(3, 0), kv_cache=caches(9, ends=False), current_end=FRAME)


@pytest.mark.parametrize(
    "start, frames, error",
    [
        (3 * FRAME + 1, 3, "current_start must be whole frames of 6 tokens, got 19"),
        (6 * FRAME, 3, "current_start must be a frame that kv_cache holds or the next one, up to 3, got frame 6"),
        (3 * FRAME, 7, "kv_cache must have slots for the sink and a block, and without a window for all frames, got 9"),
    ],
)
def test_a_pass_that_does_not_fit(module, start, frames, error):
    self_forcing.patch(module)
    made = caches(9)
    torch.manual_seed(0)
    model = model_of(module)
    first = model(tokens(3, 0), kv_cache=made)
    with pytest.raises(ValueError, match=error):
        model(tokens(frames, 1), kv_cache=made, current_start=start)
    assert torch.equal(model(tokens(3, 0), kv_cache=made), first)


def test_options_that_we_do_not_have():
    module = stand_ins.longlive2()
    self_forcing.patch(module)
    model = model_of(module)
    with pytest.raises(Unsupported, match="use_relative_rope must be False, got True"):
        model(tokens(3, 0), kv_cache=caches(9), use_relative_rope=True)
    with pytest.raises(Unsupported, match=r"kv_cache\['quantized'\] must be 0, got 1"):
        model(tokens(3, 0), kv_cache=[cache | {"quantized": True} for cache in caches(9)])
    with pytest.raises(Unsupported, match="pinned_start and pinned_len must be whole frames of 6 tokens, got 6 and 7"):
        pinned = {"pinned_start": torch.tensor([6]), "pinned_len": torch.tensor([7])}
        model(tokens(3, 0), kv_cache=[cache | pinned for cache in caches(9)])
    model.layers[0].max_attention_size = 40
    with pytest.raises(Unsupported, match="max_attention_size must be whole frames of 6 tokens, got 40"):
        model(tokens(3, 0), kv_cache=caches(9))
    with pytest.raises(Unsupported, match=r"x must not require gradients .* run under torch.no_grad"):
        module.CausalWanModel()(tokens(3, 0), kv_cache=caches(9))
    self_forcing.unpatch()


def test_what_was_zeroed_is_written_before_it_is_read(module):
    self_forcing.patch(module)
    made = caches(9)
    call(module, made)
    made[1]["v"].zero_()
    for refused in (lambda: call(module, made, 3 * FRAME), lambda: made[0]["k"][:]):
        with pytest.raises(ValueError, match="kv_cache must be written before it is read: 3 of 3 frames were zeroed"):
            refused()
    call(module, made)
    call(module, made, 3 * FRAME)
    assert made[0]["k"][:, :].shape == (1, 36, 2, 16)


@pytest.mark.parametrize("relative", [stand_ins.self_forcing, stand_ins.longlive1])
def test_a_pass_that_was_broken_off_may_be_made_again(relative):
    module = relative()
    self_forcing.patch(module)
    model, made = model_of(module, window=6, sink=1), caches(6)
    model_again, made_again = model, caches(6)
    for i in range(4):
        expected = model(tokens(3, i), kv_cache=made, current_start=3 * i * FRAME)
        last = model.layers[1]
        model.layers[1] = None
        with pytest.raises(TypeError):
            model(tokens(3, 50), kv_cache=made_again, current_start=3 * i * FRAME)
        model.layers[1] = last
        assert torch.equal(model_again(tokens(3, i), kv_cache=made_again, current_start=3 * i * FRAME), expected)
    self_forcing.unpatch()


def test_a_fork_needs_room_for_what_becomes_different(module):
    with pytest.raises(ValueError, match="kv_cache must be one that a patched model has been called with"):
        self_forcing.fork(caches(9))
    self_forcing.patch(module)
    made = caches(6)
    for i in range(2):
        call(module, made, 3 * i * FRAME, window=6)
    torch.manual_seed(0)
    model, other = model_of(module, window=6), self_forcing.fork(made)
    expected = model(tokens(3, 0), kv_cache=other, current_start=6 * FRAME)
    for _ in range(2):
        with pytest.raises(OutOfPages, match="asked for"):  # there is room for one world's second block
            model(tokens(3, 0), kv_cache=made, current_start=6 * FRAME)
    other[0]["k"].zero_()
    assert torch.equal(model(tokens(3, 0), kv_cache=made, current_start=6 * FRAME), expected)


def test_slots():
    rolling = Rules(sink=1, rolls=True)
    assert place(0, 0, 0, 3, 6, rolling) == (Span(0, 0, 0, 3), 0)
    assert place(3, 3, 0, 3, 6, rolling) == (Span(0, 0, 0, 3), 0)  # again
    assert place(6, 6, 6, 3, 6, rolling) == (Span(6, 3, 3, 6), 3)
    assert place(9, 6, 6, 3, 6, rolling) == (Span(6, 3, 3, 6), 0)  # again: nothing more is rolled out
    keeping = Rules(sink=3, rolls=True, keeps_sink=True)
    assert place(15, 12, 3, 12, 12, keeping) == (Span(3, 0, 3, 12), 0)  # the window made anew, behind its sink
    assert place(12, 12, 0, 12, 12, keeping) == (Span(0, 0, 0, 12), 0)  # with the sink
    assert read(Span(6, 3, 3, 6), Rules(limit=4)) == [2, 3, 4, 5]
    assert read(Span(6, 3, 3, 6), Rules(sink=1, limit=4, sink_first=True)) == [0, 3, 4, 5]
    with pytest.raises(Unsupported, match="max_attention_size must hold the sink and the block that is made"):
        read(Span(6, 3, 3, 6), Rules(sink=2, limit=4, sink_first=True))
    assert biases(6, Rules(bias=-1.0, unbiased=2)) == [0, -1, -1, -1, 0, 0]
    assert biases(2, Rules(bias=-1.0, unbiased=2)) == [0, 0]


def test_every_contract_has_a_stand_in():
    found = [self_forcing.patch(getattr(stand_ins, name)()).what for name in
             ("self_forcing", "causvid", "longlive1", "longlive2", "krea")]  # fmt: skip
    assert found == [contract.repositories for contract in CONTRACTS]
    self_forcing.unpatch()
