// The connection to the server: messages and video. See asyncapi.json.

const choice = new URLSearchParams(location.search).get("transport"); // "webrtc", "websocket" or "jpeg": for tests
// ms for WebRTC to bring a picture; after that video comes through the WebSocket.
const CONNECT = choice === "webrtc" ? 60000 : 5000;

export class Link extends EventTarget {
  constructor(video) {
    super();
    this.video = video;
    this.transport = "";
    this.origin = null; // of RTP's clock
    this.waiting = new Map();
    this.count = 0;
    this.delay = 250;
    this.open();
  }

  open() {
    const query = new URLSearchParams(location.search).get("token");
    const address = new URL("ws" + (query ? `?token=${encodeURIComponent(query)}` : ""), location.href);
    address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = (this.socket = new WebSocket(address, "inferix.v1"));
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      this.delay = 250;
      this.send({ type: "hello", drive: !new URLSearchParams(location.search).has("watch") });
      this.emit("open");
      this.ping = setInterval(() => this.sendQuick({ type: "ping", time: performance.now() }), 1000);
    };
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.receive(JSON.parse(data)) : this.picture(data));
    socket.onclose = () => {
      clearInterval(this.ping);
      this.endPeer();
      this.ready = false;
      for (const { reject } of this.waiting.values()) reject(new Error("the connection was lost"));
      this.waiting.clear();
      this.emit("lost");
      setTimeout(() => this.open(), (this.delay = Math.min(5000, this.delay * 1.7)));
    };
  }

  emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  send(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  // Over the unordered channel, if there is one: what is lost is soon said again.
  sendQuick(message) {
    if (this.channel?.readyState === "open") this.channel.send(JSON.stringify(message));
    else this.send(message);
  }

  // Resolves when the server has followed, rejects with its reason if it has not.
  request(type, fields = {}) {
    const id = `r${++this.count}`;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.send({ type, id, ...fields });
    });
  }

  receive(message) {
    if (message.type === "done" || message.type === "answer") {
      this.waiting.get(message.id)?.resolve(message.type === "answer" ? message.sdp : message.result);
      this.waiting.delete(message.id);
    } else if (message.type === "error" && this.waiting.has(message.id)) {
      this.waiting.get(message.id).reject(new Error(message.text));
      this.waiting.delete(message.id);
    } else if (message.type === "rtp") {
      this.origin = message.origin;
    } else if (message.type === "welcome" && !this.ready) {
      this.ready = true;
      this.emit("welcome", message);
      this.startVideo(message.webrtc);
      return;
    }
    this.emit(message.type, message);
  }

  // Video

  async startVideo(webrtc) {
    const forced = choice === "websocket" || choice === "jpeg";
    if (webrtc && !forced && "RTCPeerConnection" in window) {
      try {
        await this.connectPeer();
        return this.using("WebRTC");
      } catch (error) {
        console.info("WebRTC:", error.message);
        this.endPeer();
      }
    }
    const codec = choice !== "jpeg" && (await canDecode()) ? "h264" : "jpeg";
    this.request("video", { codec }).catch(() => {});
    this.using(codec === "h264" ? "WebSocket · H.264" : "WebSocket · JPEG");
  }

  using(transport) {
    this.transport = transport;
    this.emit("transport", transport);
  }

  async connectPeer() {
    const peer = (this.peer = new RTCPeerConnection({ iceServers: [] }));
    this.channel = peer.createDataChannel("keys", { ordered: false, maxRetransmits: 0 });
    this.channel.onmessage = ({ data }) => this.receive(JSON.parse(data));
    const { receiver } = peer.addTransceiver("video", { direction: "recvonly" });
    if ("jitterBufferTarget" in receiver) receiver.jitterBufferTarget = 0;
    if ("playoutDelayHint" in receiver) receiver.playoutDelayHint = 0;
    const shown = new Promise((resolve, reject) => {
      peer.ontrack = ({ track }) => this.show(track, resolve);
      peer.onconnectionstatechange = () => {
        if (peer.connectionState === "failed") reject(new Error("no way through"));
      };
      setTimeout(() => reject(new Error(`no picture within ${CONNECT} ms`)), CONNECT);
    });
    shown.catch(() => {});
    await peer.setLocalDescription();
    await gathered(peer);
    const sdp = await this.request("offer", { sdp: peer.localDescription.sdp });
    await peer.setRemoteDescription({ type: "answer", sdp });
    await shown;
    peer.onconnectionstatechange = () => {
      if (this.peer !== peer || peer.connectionState !== "failed") return;
      this.endPeer();
      this.startVideo(false); // the network has changed: go on through the WebSocket
    };
  }

  // A <video> holds pictures back until they come evenly; the server has spaced them already, so they are taken as they
  // come where that can be done. There is nothing to end: with the peer ends its track, and with the track its pictures.
  show(track, begun) {
    if ("MediaStreamTrackProcessor" in window && "metadata" in VideoFrame.prototype) {
      const { readable } = new MediaStreamTrackProcessor({ track, maxBufferSize: 1 });
      const write = (image) => {
        begun();
        this.emit("picture", { image, pts: this.time(image.metadata().rtpTimestamp) });
      };
      readable.pipeTo(new WritableStream({ write })).catch((error) => console.info("WebRTC:", error.message));
    } else {
      this.video.srcObject = new MediaStream([track]);
      this.video.play().catch(() => {});
      this.video.addEventListener("loadeddata", begun, { once: true });
    }
  }

  // The server's timestamp, modulo 2^32, of a picture with RTP's; null if it isn't known (yet).
  time(rtp) {
    return this.origin === null || rtp === undefined ? null : (rtp - this.origin + 2 ** 32) % 2 ** 32;
  }

  endPeer() {
    this.peer?.close();
    this.peer = this.channel = this.origin = null;
    this.video.srcObject = null;
    this.decoder?.close();
    this.decoder = null;
  }

  picture(data) {
    const view = new DataView(data);
    const [key, codec] = [view.getUint8(1) & 1, view.getUint8(2)];
    const pts = Number(view.getBigUint64(8));
    const bytes = new Uint8Array(data, 16);
    if (codec === 1) {
      createImageBitmap(new Blob([bytes], { type: "image/jpeg" })).then((image) => this.emit("picture", { image, pts }));
      return;
    }
    if (this.decoder?.state !== "configured") {
      if (!key) return;
      this.decoder = new VideoDecoder({
        output: (image) => this.emit("picture", { image, pts: image.timestamp }),
        error: (error) => console.warn("decoder:", error.message),
      });
      this.decoder.configure({ codec: "avc1.42001f", optimizeForLatency: true });
    }
    this.decoder.decode(new EncodedVideoChunk({ type: key ? "key" : "delta", timestamp: pts, data: bytes }));
  }
}

async function canDecode() {
  if (!("VideoDecoder" in window)) return false; // also: only pages of https and localhost have it
  try {
    return (await VideoDecoder.isConfigSupported({ codec: "avc1.42001f", optimizeForLatency: true })).supported;
  } catch {
    return false;
  }
}

function gathered(peer) {
  return new Promise((resolve) => {
    const done = () => peer.iceGatheringState === "complete" && resolve();
    peer.addEventListener("icegatheringstatechange", done);
    setTimeout(resolve, 500); // what has been found by then will do
    done();
  });
}
