// The figures next to the picture. All are measured: in this browser, or by the server and sent with each block.

const NAMES = { pictures: "to pictures", transfer: "hand over", block: "rest of the block" };
const SMALL = 0.005; // of a block: not worth a line
const KEEP = 200; // samples that the percentiles are of

export class Figures {
  constructor(panel) {
    this.$ = (id) => panel.querySelector(`#${id}`);
    this.delays = [];
    this.blocks = [];
    this.ways = [];
    this.clocks = [];
    this.offset = null;
    this.parts = []; // names of spans, in the order of their colours
  }

  // ms from pressing a key to seeing the first picture that follows it
  latency(delays) {
    if (!delays.length) return;
    this.delays = [...this.delays, ...delays].slice(-KEEP);
    this.$("f-latency").textContent = Math.round(delays.at(-1));
    const sorted = [...this.delays].sort((a, b) => a - b);
    const at = (share) => Math.round(sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))]);
    this.$("f-latency-more").textContent = `p50 ${at(0.5)} · p95 ${at(0.95)} of ${sorted.length}`;
  }

  shown(fps) {
    this.$("f-shown").textContent = fps.toFixed(1);
  }

  // The server's clock in terms of ours, from the answer that was quickest: it is off by half its way at most.
  answer({ time, clock }, now) {
    this.clocks = [...this.clocks, { trip: now - time, offset: (time + now) / 2 - clock / 90 }].slice(-20);
    const quickest = this.clocks.reduce((best, sample) => (sample.trip < best.trip ? sample : best));
    this.offset = quickest.offset;
    this.$("f-rtt").textContent = (now - time).toFixed(1);
  }

  // ms from handing a picture to the encoder to its being seen
  arrived(pts, seen) {
    if (this.offset === null) return;
    this.ways = [...this.ways, seen - this.offset - pts / 90].slice(-KEEP);
    if (this.ways.length % 8 === 0) this.$("f-way").textContent = Math.round([...this.ways].sort((a, b) => a - b)[this.ways.length >> 1]);
  }

  block({ frames, queue, slips, seconds, spans, kv_bytes }) {
    this.blocks = [...this.blocks, { frames, seconds, spans }].slice(-16);
    const made = this.blocks.reduce((total, block) => total + block.frames, 0);
    const spent = this.blocks.reduce((total, block) => total + block.seconds.total, 0);
    this.$("f-made").textContent = (made / spent).toFixed(1);
    this.$("f-queue").textContent = queue;
    this.$("f-slips").textContent = slips;
    this.$("f-block").textContent = `${((1000 * spent) / this.blocks.length).toFixed(0)} ms, ${frames} pictures`;
    this.split();
    this.memory(kv_bytes);
  }

  // Where a block's time goes: what the profiler measured, a colour for each span's name.
  split() {
    const sums = {};
    for (const { spans } of this.blocks) for (const [part, time] of Object.entries(spans)) sums[part] = (sums[part] ?? 0) + Math.max(0, time);
    const whole = Object.values(sums).reduce((total, sum) => total + sum, 0);
    const shown = Object.keys(sums).filter((part) => sums[part] > SMALL * whole);
    for (const part of shown) if (!this.parts.includes(part)) this.parts.push(part);
    const hue = (part) => `hsl(${(38 + 137.5 * this.parts.indexOf(part)) % 360} 62% 62%)`;
    this.$("split").replaceChildren(
      ...shown.map((part) => {
        const piece = document.createElement("i");
        piece.style.background = hue(part);
        piece.style.flexGrow = sums[part] / whole;
        return piece;
      }),
    );
    this.$("split-key").replaceChildren(
      ...shown.map((part) => {
        const line = document.createElement("li");
        line.style.setProperty("--hue", hue(part));
        const time = document.createElement("b");
        time.textContent = `${((1000 * sums[part]) / this.blocks.length).toFixed(1)} ms`;
        line.append(NAMES[part] ?? part, time);
        return line;
      }),
    );
  }

  memory(bytes) {
    const text = JSON.stringify(bytes);
    if (text === this.bytes) return;
    this.bytes = text;
    const most = Math.max(...Object.values(bytes));
    this.$("kv").replaceChildren(
      ...Object.entries(bytes).map(([format, count]) => {
        const line = document.createElement("li");
        line.style.setProperty("--share", count / most);
        const size = document.createElement("b");
        size.textContent = count >= 2 ** 30 ? `${(count / 2 ** 30).toFixed(2)} GiB` : `${(count / 2 ** 20).toFixed(1)} MiB`;
        line.append(format, size);
        return line;
      }),
    );
  }
}
