// Keys, touch pad and gamepad as one state: what is held down, in the order in which it was pressed.

const ARROWS = { ArrowUp: "up", ArrowDown: "down", ArrowLeft: "left", ArrowRight: "right" };
const REPEAT = 200; // ms: held keys are said again, since the channel may lose a message

export class Pads extends EventTarget {
  constructor(link, pad) {
    super();
    this.link = link;
    this.actions = [];
    this.keys = {};
    this.held = []; // [source, action]
    this.seq = 0;
    this.pressed = new Map(); // seq -> when it was pressed
    addEventListener("keydown", (event) => this.key(event, true));
    addEventListener("keyup", (event) => this.key(event, false));
    addEventListener("blur", () => this.clear());
    link.addEventListener("open", () => (this.held = []));
    setInterval(() => this.held.length && this.say(), REPEAT);
    this.touch(pad);
    this.gamepad();
  }

  configure({ actions, keys }) {
    this.actions = actions;
    this.keys = { ...keys };
    for (const [key, action] of Object.entries(ARROWS)) if (actions.includes(action)) this.keys[key.toLowerCase()] = action;
  }

  key(event, down) {
    const action = this.keys[event.key.toLowerCase()];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    if (down && event.target.closest?.("input:not([type=range]):not([type=checkbox]), textarea, dialog")) return;
    if (down && event.key === " " && event.target.closest?.("button")) return;
    event.preventDefault();
    if (!event.repeat) this.set(event.key.toLowerCase(), down ? action : null, event.timeStamp);
  }

  set(source, action, when = performance.now()) {
    if (!this.actions.includes(action)) action = null; // a gamepad's four ways, of a model that has others
    const before = this.held.find(([name]) => name === source)?.[1] ?? null;
    if (before === action) return;
    this.held = this.held.filter(([name]) => name !== source);
    if (action) this.held.push([source, action]);
    this.seq = Math.max(this.seq + 1, 1);
    if (action) this.pressed.set(this.seq, when);
    if (this.pressed.size > 64) this.pressed.delete(this.pressed.keys().next().value);
    this.say();
    this.dispatchEvent(new Event("change"));
  }

  clear() {
    for (const [source] of this.held) this.set(source, null);
  }

  say() {
    if (this.actions.length) this.link.sendQuick({ type: "keys", seq: this.seq, pressed: this.held.map(([, action]) => action).slice(-8) });
  }

  // A picture that follows the keys up to `seq` was seen: how long did each press take?
  followed(seq, seen) {
    const delays = [];
    for (const [pressed, when] of this.pressed) {
      if (pressed > seq) continue;
      delays.push(seen - when);
      this.pressed.delete(pressed);
    }
    return delays;
  }

  touch(pad) {
    const stick = pad.querySelector("#stick");
    const move = (event) => {
      const box = pad.getBoundingClientRect();
      const x = (event.clientX - box.x - box.width / 2) / (box.width / 2);
      const y = (event.clientY - box.y - box.height / 2) / (box.height / 2);
      const length = Math.hypot(x, y);
      const reach = Math.min(1, length) / Math.max(length, 1e-6);
      stick.style.transform = `translate(${x * reach * 30}px, ${y * reach * 30}px)`;
      this.set("touch", length < 0.25 ? null : Math.abs(x) > Math.abs(y) ? (x > 0 ? "right" : "left") : y > 0 ? "down" : "up", event.timeStamp);
    };
    const end = () => {
      stick.style.transform = "";
      this.set("touch", null);
    };
    pad.addEventListener("pointerdown", (event) => {
      pad.setPointerCapture(event.pointerId);
      event.preventDefault();
      move(event);
    });
    pad.addEventListener("pointermove", (event) => pad.hasPointerCapture(event.pointerId) && move(event));
    pad.addEventListener("pointerup", end);
    pad.addEventListener("pointercancel", end);
  }

  gamepad() {
    const poll = () => {
      const pad = [...navigator.getGamepads()].find(Boolean);
      if (!pad) return;
      const [x = 0, y = 0] = pad.axes;
      const on = (button) => pad.buttons[button]?.pressed;
      let action = on(12) ? "up" : on(13) ? "down" : on(14) ? "left" : on(15) ? "right" : null;
      if (!action && Math.hypot(x, y) > 0.5) action = Math.abs(x) > Math.abs(y) ? (x > 0 ? "right" : "left") : y > 0 ? "down" : "up";
      this.set("gamepad", action);
      requestAnimationFrame(poll);
    };
    addEventListener("gamepadconnected", poll);
  }
}
