// What is seen: one canvas per world, cut from one picture; and when each picture was seen.

const KEEP = 400; // pictures of the past, for the slider

export class Screen extends EventTarget {
  constructor(link, figures, glow) {
    super();
    this.link = link;
    this.canvases = Object.fromEntries(figures.map((figure) => [figure.dataset.world, figure.querySelector("canvas")]));
    this.glow = glow.getContext("2d");
    this.frames = new Map(); // pts modulo 2^32, which is all that RTP knows -> the server's `frame` message
    this.past = new Map(); // "world position" -> small canvas
    this.times = []; // when pictures were shown, over the last two seconds
    this.newest = null;
    link.addEventListener("frame", ({ detail }) => this.expect(detail));
    link.addEventListener("picture", ({ detail }) => this.arrive(detail));
    if ("requestVideoFrameCallback" in link.video) this.watch();
    else this.poll();
    // A page that is not seen gets no animation frames; it shall not collect pictures, either.
    document.addEventListener("visibilitychange", () => this.newest?.image.close());
  }

  expect(frame) {
    this.frames.set(frame.pts % 2 ** 32, frame);
    if (this.frames.size > 300) this.frames.delete(this.frames.keys().next().value);
    this.last = frame;
  }

  // WebRTC in a <video>: the browser says which picture is shown, and when.
  watch() {
    const { video } = this.link;
    video.requestVideoFrameCallback((now, info) => {
      // Drawn now, it can't have been seen before now, whatever the browser expected of the video itself.
      const seen = Math.max(info.expectedDisplayTime, performance.now());
      this.draw(video, video.videoWidth, video.videoHeight, this.find(this.link.time(info.rtpTimestamp)), seen);
      this.watch();
    });
  }

  // Browsers without that callback show the picture, but can't tell which one it is.
  poll() {
    requestAnimationFrame((now) => {
      const { video } = this.link;
      if (video.srcObject && video.currentTime !== this.time) {
        this.time = video.currentTime;
        this.draw(video, video.videoWidth, video.videoHeight, null, now);
      }
      this.poll();
    });
  }

  find(pts) {
    return pts === null ? null : (this.frames.get(pts % 2 ** 32) ?? null);
  }

  // The newest picture is drawn with the next animation frame, and seen when that one ends.
  arrive(picture) {
    this.newest?.image.close();
    const idle = this.newest === null;
    this.newest = picture;
    if (!idle) return;
    requestAnimationFrame((now) => {
      const { image, pts } = this.newest;
      this.newest = null;
      const [width, height] = [image.displayWidth ?? image.width, image.displayHeight ?? image.height];
      try {
        this.draw(image, width, height, this.find(pts), now + 1000 / 60);
      } catch (error) {
        console.info("picture:", error.message); // closed while the page was out of sight
      }
      image.close();
    });
  }

  draw(source, width, height, frame, seen) {
    if (!width) return;
    const worlds = (frame ?? this.last)?.worlds ?? ["a"];
    const part = width / worlds.length;
    worlds.forEach((world, i) => {
      const canvas = this.canvases[world];
      if (canvas.width !== part || canvas.height !== height) [canvas.width, canvas.height] = [part, height];
      canvas.getContext("2d").drawImage(source, i * part, 0, part, height, 0, 0, part, height);
    });
    this.times.push(seen);
    while (this.times[0] < seen - 2000) this.times.shift();
    if (this.times.length % 4 === 0) this.glow.drawImage(source, 0, 0, width, height, 0, 0, 12, 8);
    this.dispatchEvent(new CustomEvent("seen", { detail: { frame, seen } }));
  }

  // Pictures per second, as seen.
  fps(now) {
    const recent = this.times.filter((time) => time > now - 2000);
    return recent.length < 2 ? 0 : ((recent.length - 1) * 1000) / Math.max(recent.at(-1) - recent[0], now - recent[0] - 200);
  }

  // The past, for the slider

  remember(world, position) {
    const source = this.canvases[world];
    if (!source.width) return;
    const small = document.createElement("canvas");
    small.height = 96;
    small.width = Math.round((96 * source.width) / source.height);
    small.getContext("2d").drawImage(source, 0, 0, small.width, small.height);
    this.past.set(`${world} ${position}`, small);
    if (this.past.size > KEEP) this.past.delete(this.past.keys().next().value);
  }

  preview(world, position) {
    for (let at = position; at >= 0 && at > position - 24; at--) {
      const small = this.past.get(`${world} ${at}`);
      if (!small) continue;
      const canvas = this.canvases[world];
      const context = canvas.getContext("2d");
      context.imageSmoothingEnabled = false;
      return context.drawImage(small, 0, 0, canvas.width, canvas.height);
    }
  }
}
