"""A running world: actions and prompts in, pictures out. Long because almost half of it is docstrings.

world = World("tiny", kv="int8", seed=0)
frames = world.step(actions=["right"] * 3, prompt="desert night")     # uint8 [3, 96, 96, 3]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from torch import Tensor

from inferix_kernels import PageTable, Policy, profile
from inferix_kernels._check import whole

from .decode.contract import Model
from .facts import Facts
from .finite import NotFinite
from .history import Coming, Pictures
from .inputs import Action, actions_of, conditioning_of, lasting, latents_of, recache_of
from .models import load_model
from .opening import (
    check_counts,
    check_format,
    check_seed,
    open_decoder,
    open_store,
    policy_for,
    recorder_for,
    say_unusual,
    working_format,
)
from .tracing import shown
from .turns import one_at_a_time


class World(Facts):
    """One world, opened and steered.

    Threads: a world takes one call at a time, another one raises RuntimeError. A world and its forks, and others of one
    model, may be at work in a thread each: every one makes the frames that it would make alone.

    Args:
        model: a name from inferix.models.MODELS, or a Model.
        kv: format of the committed pages, see inferix_kernels.layout.FORMATS.
        window: frames a block sees, its own included; by default what the model was trained for.
        sink: first frames that are never forgotten.
        past_bias, time: how a block reads the past, and when its rotary positions are counted, "absolute" or
            "relative"; see inferix_kernels.Policy. By default as the model's adapter says.
        on_evict: called as on_evict(table, frame) before a frame leaves the window; see inferix_kernels.Policy.
        undo: frames that `rewind` can take back, besides the block made last. A VAE that looks back in time keeps its
            state for each of these blocks, gigabytes at 480p; with 0, such a world can not be rewound.
        blocks: that the world is to have, for a model with several in flight: after them it begins none. None: no end.
        worlds: that the store has room for, this one and its forks, should they come to share nothing.
        seed: of all noise. The same seed, actions and prompts give the same frames.
        weights: checkpoint file or folder, for models that do not ship one.
        backend: kernels to run on; see `python -m inferix_kernels`.
        precision: of attention's products over quantized pages: "exact", "8bit" or "auto"; see inferix_kernels.KVStore.
        graphs: capture the network's forwards as CUDA graphs, one for each kind of forward, and replay them: the host
            launches one graph in place of a thousand kernels. On a GPU, for a model with one block at a time; forwards
            that read the past by a bias or by relative time are launched from Python. Never run on a GPU.
        linear: what the network's inner linear layers are kept in and multiplied in: "int8" or "fp8", or "bf16", the
            whole network in bfloat16; None: as the model's loader has it. A Model is loaded with it.
        options: passed on to the model's loader, for example size=(height, width) in pixels.

    Raises:
        ValueError: an argument is not what it must be; nothing has been allocated.

    Example:
        >>> from inferix import World
        >>> world = World("tiny", kv="int8", seed=0, undo=6, worlds=2)
        >>> frames = world.step(action="right", prompt="desert night")
        >>> frames.shape, frames.dtype
        ((3, 96, 96, 3), dtype('uint8'))
    """

    def __init__(
        self,
        model: str | Model = "tiny",
        *,
        kv: str = "int8",
        window: int | None = None,
        sink: int | None = None,
        past_bias: float | None = None,
        time: str | None = None,
        on_evict: Callable[[PageTable, int], None] | None = None,
        undo: int = 0,
        blocks: int | None = None,
        worlds: int = 1,
        seed: int = 0,
        weights: str | None = None,
        backend: str = "auto",
        precision: str = "auto",
        graphs: bool = False,
        linear: str | None = None,
        **options: Any,
    ):
        check_format(kv)
        check_seed(seed)
        if linear is not None and not isinstance(model, str):
            raise ValueError("linear must not be given with a Model: load_model(..., linear=...) makes one so")
        self.model = load_model(model, weights, linear=linear, **options) if isinstance(model, str) else model
        adapter = self.model.adapter
        working = working_format(self.model)
        policy = policy_for(adapter, kv, window, sink, undo, past_bias, time, on_evict, working)
        check_counts(adapter, blocks, worlds)
        say_unusual(adapter, policy)
        self._recorder, self._warm = recorder_for(self.model, graphs), False
        self.worlds, self._blocks = worlds, blocks
        self._negative = None if adapter.guidance == 1 else self.model.conditioning(adapter.negative_prompt, [])
        self.store = open_store(self.model, policy, worlds, backend, precision)
        self._begin(policy, seed)

    def _begin(self, policy: Policy, seed: int) -> None:
        table = self.store.open(policy)
        self.decoder = open_decoder(self.model, table, seed, self._negative, self._blocks, self._recorder)
        self._show(Pictures(self.model.stream(), policy.undo, self.model.device))
        self.prompt = None

    def _show(self, pictures: Pictures) -> None:
        """Make pictures with these from now on."""
        self.pictures = pictures
        self.decoder.restart = pictures.restart

    @one_at_a_time
    def step(
        self,
        actions: Sequence[Action] | None = None,
        prompt: str | None = None,
        *,
        action: Action | None = None,
        recache: bool | str | None = None,
    ) -> np.ndarray:
        """Make the next block or, of a model with several in flight, begin one and move all by a stage.

        Args:
            actions: one per frame of the block; none for a model that takes none.
            action: in their place, one held for the whole block.
            prompt: of the world from this block on; None keeps the last prompt. Of a model whose videos have several
                shots, one that begins with `Shots.cut` of its adapter begins another.
            recache: when the prompt changes, compute what the window remembers again under the new one, in the way of
                the model's adapter (True) or one that is named; see inferix.decode.contract.RECACHES. None does as the
                adapter says. Not for a model that takes actions: each block was made under its own.

        Returns:
            uint8 [pictures, height, width, 3]: none as long as a pipeline fills. A model without a VAE gives its
            latents, float32 [frames, ...].

        Raises:
            NotFinite: NaN or infinity came out; names the layer. This world has ended, its forks go on.

        Example:
            >>> frames = world.step(actions=["up", "up", "left"])  # one per frame, under the same prompt
            >>> frames = world.step(action="none", prompt="glacier day")  # the look changes with this block
        """
        with profile.block(self.pictures.gpu) as block:
            return self._taken(self._advance(block, "step", None, actions, action, prompt, recache))

    @one_at_a_time
    def advance(
        self,
        actions: Sequence[Action] | None = None,
        prompt: str | None = None,
        *,
        action: Action | None = None,
        recache: bool | str | None = None,
        latents: Tensor | None = None,
    ) -> Coming:
        """The same without waiting for the pictures: they are decoded while the next block is made, and are those that
        `step` gives, bit for bit. There is one block of them under way at a time: the next call waits for them once its
        own block is made, and so does what needs to know where pictures stand (`fork`, `rewind`, `observe`, saving).

        Args:
            actions, prompt, action, recache: as for `step`.
            latents: as for `replay`, the next step of an earlier run, which is taken up.

        Returns:
            The pictures to come; `result` waits for them.

        Raises:
            NotFinite: the block is not finite, or pictures of the block before are not; names the layer. This world has
                ended. And as `step` and `replay`.

        Example:
            >>> coming = world.advance(action="up")
            >>> following = world.advance(action="left")  # made while the pictures of `coming` are decoded
            >>> coming.result().shape
            (3, 96, 96, 3)
        """
        with profile.block(self.pictures.gpu) as block:
            return self._advance(block, "advance", latents, actions, action, prompt, recache)

    @one_at_a_time
    def replay(
        self,
        latents: Tensor,
        actions: Sequence[Action] | None = None,
        prompt: str | None = None,
        *,
        action: Action | None = None,
        recache: bool | str | None = None,
    ) -> np.ndarray:
        """Take up an earlier run: the next step, from what `World.latents` was after it. Costs one forward.

        Args:
            latents: as left by this very step of a world with the same seed, actions and prompts; what follows is then
                what followed there, bit for bit.
            actions, prompt, action, recache: as for `step`.

        Returns:
            As `step`.

        Raises:
            ValueError, TypeError: the latents are not of the next step's shape, or not float32 (float64 for a float64
                network); nothing has changed. And as `step`.

        Example:
            >>> first, again = (World("tiny", seed=5) for _ in range(2))
            >>> frames = first.step(action="up", prompt="desert day")
            >>> bool((again.replay(first.latents, action="up", prompt="desert day") == frames).all())
            True
        """
        self.decoder.check_replay(latents)
        with profile.block(self.pictures.gpu) as block:
            return self._taken(self._advance(block, "replay", latents, actions, action, prompt, recache))

    @one_at_a_time
    def observe(self, frames: np.ndarray, actions: Sequence[Action] = (), prompt: str | None = None) -> np.ndarray:
        """Take given frames as the world's past, as if it had made them.

        Args:
            frames: uint8 [n, height, width, 3], whole blocks: for a model with a VAE, n = 1 + 4 k makes 1 + k latents.
            actions: n, each the one that led to its frame; none for a model that takes none.
            prompt: as in `step`.

        Returns:
            uint8 [n, height, width, 3], as the model sees them: encoded and decoded again. With several blocks in
            flight those of whole blocks; the rest come with the block that they begin.

        Raises:
            NotFinite: the VAE made NaN or infinity of them, which ends the world if blocks were taken already.

        Example:
            >>> import numpy as np
            >>> given = np.repeat(frames[-1:], 3, axis=0)  # uint8 [3, 96, 96, 3]
            >>> seen = world.observe(given, actions=["none"] * 3)
        """
        self._settle("observe")
        latents = latents_of(self.model, frames, actions)
        sizes, seen = self.decoder.split_observed(len(latents)), []
        ends = accumulate(sizes, initial=0)
        then = lasting(self.model.adapter, prompt)
        conditionings = [self._condition(actions[i:end], then if i else prompt) for i, end in pairwise(ends)]
        self._warm_up(conditionings[0])
        self.prompt = self.prompt if then is None else then
        for block, conditioning in zip(latents.split(sizes), conditionings):
            before = self.frames
            self.decoder.observe(block, conditioning)
            given = f"given latent frames {before} to {before + len(block) - 1} of {self.model.adapter.name}"
            seen.append(self._taken(self.pictures.begin(block[: self.frames - before], before, given)))
        return np.concatenate(seen)

    @one_at_a_time
    def commit_pending(self) -> None:
        """Run the last block's clean pass now, so that the next block is there sooner. Left alone, it shares a forward
        of the next step, which costs less in all. With several blocks in flight nothing is done: there a clean pass by
        itself would leave other keys and values.

        Example:
            >>> world.commit_pending()
        """
        if self.decoder.commits_alone:
            self.decoder.commit_pending()

    @one_at_a_time
    def fork(self, seed: int | None = None) -> World:
        """Another world with the same past: it shares the pages and goes its own way. The store needs `worlds` for it.

        Args:
            seed: of the fork's noise; None goes on with a copy of this world's, so that the same actions give the
                same frames.

        Example:
            >>> other = world.fork()
            >>> bool((other.step(action="up") == world.step(action="up")).all())  # the same past, the same noise
            True
        """
        self._settle("fork")
        if seed is not None:
            check_seed(seed)
        other = copy.copy(self)
        other.decoder = self.decoder.fork()
        other._show(self.pictures.fork())
        if seed is not None:
            other.decoder.generator.manual_seed(int(seed))
        return other

    @one_at_a_time
    def rewind(self, frames: int) -> None:
        """Forget the last `frames` frames, whole blocks; the noise goes on. The last block always can be taken back,
        `undo` frames before it too; if pictures depend on those before them, only with an `undo`. A new rollout can not
        be taken back to before it.

        Raises:
            ValueError: it is not one of `rewinds`; nothing has changed. RuntimeError: the world was released.

        Example:
            >>> before = world.frames
            >>> frames = world.step(action="left")
            >>> world.rewind(3)
            >>> world.frames == before
            True
        """
        self._settle("rewind")
        if self.decoder.can_rewind and (frames := whole("frames", frames)) not in self.rewinds:
            sizes = ", ".join(map(str, self.rewinds))
            raise ValueError(
                f"frames must be one of {sizes}, whole blocks that are remembered, got {frames}: World(undo=...) "
                "remembers more"
            )
        self.decoder.rewind(frames)
        self.pictures.rewind(self.frames)

    @one_at_a_time
    def reset(self, seed: int) -> None:
        """Begin again, with nothing remembered and this seed.

        Example:
            >>> world.reset(seed=1)
            >>> world.frames
            0
        """
        check_seed(seed)
        policy = self.table.policy
        self.release()
        self._begin(policy, seed)

    @one_at_a_time
    def release(self) -> None:
        """Give this world's pages back to the store; it can't go on.

        Example:
            >>> world.release()
        """
        self.decoder.release()

    def _settle(self, call: str, wait: bool = True) -> None:
        """Raise unless this world can go on.

        Args:
            wait: for the pictures under way, to know it for certain.
        """
        if not self.decoder.released:
            with self._ends_if_not_finite():
                self.pictures.check(wait)
        if self.released:
            raise RuntimeError(f"{call}: this world was released, or lost as it was recached, and can't go on")

    def _advance(
        self,
        block: profile.Block,
        call: str,
        latents: Tensor | None,
        actions: Sequence[Action] | None,
        action: Action | None,
        prompt: str | None,
        recache: bool | str | None,
    ) -> Coming:
        """Check what a step is asked for, make its block or take these latents for it, and begin its pictures."""
        self._settle(call, wait=False)
        if latents is not None:
            self.decoder.check_replay(latents)
        chosen = actions_of(call, self.model.adapter, self.frames, actions, action)
        wanted = recache_of(self.model.adapter, self.decoder.can_recache, recache)
        conditioning, before = self._condition(chosen, prompt), self.frames
        then = self.prompt if prompt is None else lasting(self.model.adapter, prompt)
        if wanted and self.prompt is not None and prompt not in (None, self.prompt):
            self.decoder.recache(conditioning, wanted)
            self.prompt = then  # of the past, whatever becomes of the block
        self._warm_up(conditioning)
        with self._ends_if_not_finite():
            if latents is None:
                self.latents = self.decoder.step(conditioning)
            else:
                self.latents = self.decoder.replay(conditioning, latents.detach().to(self.store.device))
            self.prompt = then  # a block that failed, and a shot that it was to begin, were never there
            coming = shown(self, before, conditioning)
        block.frames = self.model.pictures_of(self.frames) - self.model.pictures_of(before)
        if profile.level() != "off":
            for format, size in self.store.held_bytes.items():
                profile.metric(f"KV bytes {format}", size)
            profile.metric("frames held", len(self.table.held))
        return coming

    def _taken(self, coming: Coming) -> np.ndarray:
        with self._ends_if_not_finite():
            return coming.result()

    @contextmanager
    def _ends_if_not_finite(self) -> Iterator[None]:
        try:
            yield
        except NotFinite:
            self.decoder.release()
            raise

    def _warm_up(self, conditioning: Any) -> None:
        """Before the first block on a GPU, made or given. A world that was loaded has no room to be warmed up: the
        forwards of its first two blocks compile what they launch."""
        if not self._warm and not self.frames and self.store.device.type == "cuda":
            with profile.timed("warm up"):
                self.decoder.warm_up(conditioning)
        self._warm = True

    def _condition(self, actions: Sequence[Action], prompt: str | None) -> Any:
        with profile.timed("conditioning"):
            return conditioning_of(self.model, actions, self.prompt if prompt is None else prompt)
