"""Video for all who watch: a picture is encoded once per codec in use, and its packet handed to everyone.

Whoever joins, or falls so far behind that the bounded queue is full, goes on with the next keyframe, which is made for
them. H.264 is Annex B with parameter sets in every keyframe, as RTP, WebCodecs and FLV all can take it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import io
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from PIL import Image

from inferix_kernels import profile

TICKS = 90_000  # per second, of all timestamps: RTP's for video
DEPTH = 12  # packets that may wait for one viewer: most of a second
KEYFRAME_SECONDS = 2.0
BITRATE = 3_500_000  # at most, from the first second on; simple pictures take less
_MATRIX = {"h264": "ITU709", "vp8": "ITU601"}  # VP8 can't say which, and everyone takes the old one
_BT709 = {"color_primaries": "bt709", "color_trc": "bt709", "colorspace": "bt709", "color_range": "tv"}


@dataclasses.dataclass(frozen=True)
class Packet:
    """One coded picture."""

    data: bytes
    frame: int
    pts: int  # ticks
    keyframe: bool


# Tried in this order. Baseline H.264 is what every browser decodes and aiortc offers.
_CHOICES = {
    "h264": [
        # NVENC has never run here: no machine with one was at hand.
        ("h264_nvenc", {"preset": "p2", "tune": "ull", "zerolatency": "1", "forced-idr": "1", "profile": "baseline"}),
        (
            "libx264",
            {"preset": "ultrafast", "tune": "zerolatency", "profile": "baseline", "forced-idr": "1", "crf": "20"},
        ),
    ],
    "vp8": [("libvpx", {"deadline": "realtime", "cpu-used": "-6", "lag-in-frames": "0", "error-resilient": "1"})],
}


@functools.cache
def choose(codec: str) -> tuple[str, dict[str, str]]:
    """The first encoder for a codec that can be opened on this machine, and its options."""
    errors = []
    for name, options in _CHOICES[codec]:
        try:
            context = av.CodecContext.create(name, "w")
            configure(context, codec, (256, 256), 16, Fraction(1, TICKS))
            context.options |= options
            context.open()
        except (av.error.FFmpegError, ValueError) as error:  # not in this build, or no device for it
            errors.append(f"{name}: {error}")
            continue
        return name, options
    raise RuntimeError(f"no encoder for {codec} can be opened here ({'; '.join(errors)})")


def configure(context: Any, codec: str, size: tuple[int, int], fps: float, tick: Fraction) -> None:
    """Set what all encoders of live video have in common: no delay, a bound on the rate, keyframes now and then."""
    context.height, context.width = size
    context.pix_fmt = "yuv420p"
    context.time_base, context.framerate = tick, Fraction(fps).limit_denominator(1001)
    context.gop_size = max(1, round(fps * KEYFRAME_SECONDS))
    context.max_b_frames = 0
    context.thread_count = 1  # enough for live speed; the other cores belong to the world
    rates = {"b": str(BITRATE), "maxrate": str(BITRATE), "bufsize": str(BITRATE // 2)}
    context.options = {**rates, **(_BT709 if codec == "h264" else {})}


def convert(picture: np.ndarray, size: tuple[int, int], codec: str, keyframe: bool) -> av.VideoFrame:
    """A picture uint8 [height, width, 3] as an encoder takes it. Enlarged pixels stay squares."""
    image = av.VideoFrame.from_numpy_buffer(np.ascontiguousarray(picture), format="rgb24")
    image = image.reformat(size[1], size[0], "yuv420p", dst_colorspace=_MATRIX[codec], interpolation="POINT")
    image.pict_type = PictureType.I if keyframe else PictureType.NONE
    return image


class Encoder:
    """Pictures uint8 [height, width, 3] of one size -> packets, without delay.

    Args:
        codec: "h264" or "vp8".
        size: pixels (height, width) of the coded picture, even.
        fps: expected pictures per second, which rate control plans with; the timestamps say when they really are.
    """

    def __init__(self, codec: str, size: tuple[int, int], fps: float):
        self.codec, self.size = codec, size
        self.name, options = choose(codec)
        self._context: Any = av.CodecContext.create(self.name, "w")
        configure(self._context, codec, size, fps, Fraction(1, TICKS))
        self._context.options |= options

    def encode(self, picture: np.ndarray, frame: int, pts: int, keyframe: bool) -> Packet | None:
        """The coded picture; None if the encoder has dropped it."""
        image = convert(picture, self.size, self.codec, keyframe)
        image.pts, image.time_base = pts, Fraction(1, TICKS)
        packets = self._context.encode(image)
        if not packets:
            return None
        return Packet(b"".join(map(bytes, packets)), frame, pts, any(packet.is_keyframe for packet in packets))


class JpegEncoder:
    """For browsers without WebCodecs: every picture is a keyframe."""

    name = "JPEG"

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def encode(self, picture: np.ndarray, frame: int, pts: int, keyframe: bool) -> Packet:
        height, width = self.size
        image = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=88)
        return Packet(buffer.getvalue(), frame, pts, True)


class Subscription:
    """What one viewer is to be sent, oldest first; bounded.

    Args:
        arrived: called when there is a packet to take.
        want_keyframe: asks the encoder for one.
    """

    def __init__(self, codec: str, arrived: Callable[[], None], want_keyframe: Callable[[], None]):
        self.codec, self.dropped = codec, 0
        self.request_keyframe = want_keyframe  # call it when the viewer has lost a picture
        self._arrived = arrived
        self._packets: deque[Packet] = deque()
        self._waiting = True  # for a keyframe

    def push(self, packet: Packet) -> None:
        if len(self._packets) >= DEPTH:
            self.dropped += len(self._packets)
            self._packets.clear()
            self._waiting = True
            self.request_keyframe()
        if self._waiting and not packet.keyframe:
            self.dropped += 1
            return
        self._waiting = False
        self._packets.append(packet)
        self._arrived()

    def pop(self) -> Packet | None:
        return self._packets.popleft() if self._packets else None


class Broadcast:
    """Encodes what is shown for every codec in use, in a thread, and hands it round.

    Args:
        scale: edge of the square that each pixel becomes.
    """

    def __init__(self, fps: float, scale: int = 1):
        self.fps, self.scale = fps, scale
        self.encode_seconds = 0.0  # of the last picture
        self._subscriptions: set[Subscription] = set()
        self._encoders: dict[str, Encoder | JpegEncoder] = {}
        # One thread: a fork is shown at once, perhaps during the next tick, and a cancelled `show` leaves its work
        # behind, but two pictures at a time in one encoder crash the process. And one core's caches hold the encoder.
        self._thread = ThreadPoolExecutor(1, "encoder")
        self._thread.submit(int)  # it begins now: if it could not begin later, that would end the show
        self._keyframe: set[str] = set()

    def subscribe(self, codec: str, arrived: Callable[[], None]) -> Subscription:
        """`arrived` is called when there is a packet to take."""
        subscription = Subscription(codec, arrived, lambda: self._keyframe.add(codec))
        self._subscriptions.add(subscription)
        self._keyframe.add(codec)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)
        if all(other.codec != subscription.codec for other in self._subscriptions):
            self._encoders.pop(subscription.codec, None)

    def close(self) -> None:
        """Nothing will be shown any more."""
        self._thread.shutdown(wait=False)

    @property
    def codecs(self) -> set[str]:
        return {subscription.codec for subscription in self._subscriptions}

    @property
    def keyframe_wanted(self) -> bool:
        return bool(self._keyframe & self.codecs)

    async def show(self, picture: np.ndarray, frame: int, pts: int) -> None:
        """Send a picture uint8 [height, width, 3] to everyone."""
        spent = 0.0
        for codec in sorted(self.codecs):
            keyframe = codec in self._keyframe
            self._keyframe.discard(codec)
            work = functools.partial(self._encode, codec, picture, frame, pts, keyframe)
            try:
                packet, seconds = await asyncio.get_running_loop().run_in_executor(self._thread, work)
            except Exception as error:
                self._encoders.pop(codec, None)
                raise RuntimeError(f"{codec} can't be encoded: {error}") from error
            spent += seconds
            if packet is None:
                continue
            for subscription in tuple(self._subscriptions):
                if subscription.codec == codec:
                    subscription.push(packet)
        self.encode_seconds = spent

    def _encode(
        self, codec: str, picture: np.ndarray, frame: int, pts: int, keyframe: bool
    ) -> tuple[Packet | None, float]:
        height, width = (side * self.scale // 2 * 2 for side in picture.shape[:2])
        with profile.timed("encode") as taken:
            encoder = self._encoders.get(codec)
            if encoder is None or encoder.size != (height, width):
                size = height, width
                encoder = JpegEncoder(size) if codec == "jpeg" else Encoder(codec, size, self.fps)
                self._encoders[codec] = encoder
            packet = encoder.encode(picture, frame, pts, keyframe)
        return packet, taken.seconds
