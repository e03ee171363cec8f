// The page: what the server says is shown, what people do is sent. State comes whole; this file only renders it.

import { Link } from "./link.js";
import { Pads } from "./pads.js";
import { Screen } from "./screen.js";
import { Figures } from "./figures.js";

const $ = (id) => document.getElementById(id);
const worlds = [...document.querySelectorAll(".world")];
const link = new Link($("source"));
const screen = new Screen(link, worlds, $("glow"));
const pads = new Pads(link, $("pad"));
const figures = new Figures($("figures"));

let welcome = null;
let state = { phase: "connecting", worlds: ["a"], steered: ["a"], prompts: {}, made: {}, undo: {} };
let me = null;
const blocks = new Map(); // number -> the server's `block` message
let said = null; // the prompt on its way: { text, frame }
let dragging = false;

const driving = () => state.driver === me;

function request(type, fields) {
  return link.request(type, fields).catch((error) => note(error.message, true));
}

let noteTimer;
function note(text, bad = false) {
  $("notice").textContent = text;
  $("notice").className = bad ? "bad" : "";
  clearTimeout(noteTimer);
  noteTimer = setTimeout(() => ($("notice").textContent = ""), bad ? 6000 : 2500);
}

// What the server says

const on = (type, follow) => link.addEventListener(type, ({ detail }) => follow(detail));

on("lost", () => {
  state = { ...state, phase: "lost" };
  render();
});
on("welcome", (message) => {
  welcome = message;
  me = message.client;
  pads.configure(message);
  document.title = `${message.model} · Inferix`;
  $("model").textContent = `${message.model} world`;
  document.body.classList.toggle("pixels", message.scale > 1);
  document.body.style.setProperty("--aspect", message.size[1] / message.size[0]);
  $("examples").replaceChildren(...message.prompts.filter(Boolean).slice(0, 12).map(example));
  $("recache").checked = message.recache;
  render();
});
on("state", (message) => {
  state = message;
  if (document.activeElement !== $("seed")) $("seed").value = state.seed;
  render();
});
on("transport", (name) => {
  $("transport").textContent = name;
  $("transport").hidden = false;
});
on("block", (block) => {
  blocks.set(block.block, block);
  if (blocks.size > 64) blocks.delete(blocks.keys().next().value);
  figures.block(block);
  state = { ...state, made: block.made, undo: block.undo };
  if (!dragging) timeline();
});
on("prompt", (prompt) => {
  if (prompt.state === "replaced") return; // by one that is announced next
  said = prompt;
  effect();
});
on("files", ({ worlds, videos }) => {
  const saved = worlds.map((name) => item(name, button("Load", () => request("load", { name }).then(() => $("files").close()))));
  const links = videos.map((name) => item(Object.assign(document.createElement("a"), { href: `files/${name}`, textContent: name, download: name })));
  $("worlds").replaceChildren(...(saved.length ? saved : [item("none yet: press Save")]));
  $("videos").replaceChildren(...(links.length ? links : [item("none yet: press Record")]));
});
on("error", (error) => error.code !== "watching" && note(error.text, true));
on("pong", (pong) => figures.answer(pong, performance.now()));

// What is seen

let lastBlock = -1;
screen.addEventListener("seen", ({ detail: { frame, seen } }) => {
  if (!frame) return;
  figures.arrived(frame.pts, seen);
  const block = blocks.get(frame.block);
  if (block) figures.latency(pads.followed(block.applied_seq, seen));
  if (block && frame.block !== lastBlock) {
    lastBlock = frame.block;
    for (const world of frame.worlds) if (world in block.positions) screen.remember(world, block.positions[world]);
  }
  if (said?.state === "applied" && !said.seen && frame.frame >= said.frame) {
    said.seen = true;
    effect();
  }
});
setInterval(() => figures.shown(screen.fps(performance.now())), 500);

function effect() {
  const texts = { waiting: "with the next block …", applied: said.seen ? "in force" : "on its way to the screen …" };
  $("effect").textContent = said ? `“${said.text}” ${texts[said.state]}` : "";
  $("effect").classList.toggle("live", Boolean(said.seen));
  for (const chip of $("examples").children) chip.classList.toggle("waiting", chip.textContent === said.text && !said.seen);
}

// Rendering

function render() {
  const drive = driving();
  document.body.dataset.phase = state.phase;
  document.body.classList.toggle("paused", Boolean(state.paused));
  document.body.classList.toggle("forked", state.worlds.length > 1);
  for (const figure of worlds) {
    const name = figure.dataset.world;
    figure.hidden = !state.worlds.includes(name);
    figure.classList.toggle("steered", state.worlds.length > 1 && state.steered.includes(name));
    figure.querySelector(".words").textContent = state.prompts[name] ?? "";
    figure.querySelector(".close").hidden = state.worlds.length < 2 || !drive;
  }
  const said = state.prompts[state.steered[0]];
  for (const chip of $("examples").children) chip.setAttribute("aria-pressed", String(chip.textContent === said));
  $("pause").textContent = state.paused ? "Go on" : "Pause";
  $("step").disabled = !state.paused;
  $("fork").hidden = state.worlds.length > 1 || !welcome?.can_fork;
  $("both").hidden = state.worlds.length < 2;
  $("both").setAttribute("aria-pressed", String(state.steered.length > 1));
  $("record").classList.toggle("on", Boolean(state.recording));
  $("record").lastChild.textContent = state.recording ? "Stop" : "Record";
  $("recache-choice").hidden = !welcome?.can_recache;
  $("profile").checked = state.profile === "layer";
  $("profile").disabled = !drive || state.phase !== "running";
  $("viewers").hidden = !(state.viewers > 1);
  $("viewers").textContent = `${state.viewers} watching`;
  $("pushing").hidden = !state.pushing?.length;
  $("pushing").textContent = (state.pushing ?? []).map(({ to, state }) => `${to} ${state}`).join(" · ");
  $("pad").hidden = !(drive && fourWays());
  $("say").hidden = !welcome?.words;
  for (const control of $("controls").querySelectorAll("button, input")) {
    if (control.id !== "step" || !drive) control.disabled = !drive || state.phase !== "running";
  }
  veil();
  timeline();
  hint();
}

function veil() {
  const texts = { connecting: "Connecting …", opening: "Opening the world …", lost: "The server is gone. Trying again …", crashed: "The world has crashed. The server stands." };
  $("veil").hidden = !(state.phase in texts);
  $("veil-text").textContent = texts[state.phase] ?? "";
  $("veil-more").hidden = !state.crash;
  $("veil-more").textContent = state.crash ?? "";
  $("restart").hidden = state.phase !== "crashed" || !driving();
}

function hint() {
  const steering = !welcome?.actions.length ? `${welcome?.model} is steered by words alone` : fourWays() ? "WASD, arrows, touch or gamepad steer" : keysShown();
  const examples = welcome?.words ? " · number keys say an example" : "";
  if (driving()) $("hint").textContent = `${steering}${examples} · p pauses · f forks · h figures`;
  else if (state.driver) $("hint").textContent = "You are watching: somebody else is at the wheel.";
  else $("hint").replaceChildren("Nobody is at the wheel. ", button("Take it", () => request("wheel", { take: true })));
}

function fourWays() {
  return ["up", "down", "left", "right"].every((action) => welcome?.actions.includes(action));
}

function keysShown() {
  const keys = Object.entries(welcome.keys).filter(([key]) => key.length === 1 && key !== " ");
  return keys.map(([key, action]) => `${key} ${action}`).join(" · ");
}

function timeline() {
  const world = state.steered[0];
  const made = state.made[world] ?? 0;
  const undo = state.undo[world] ?? 0;
  $("timeline").hidden = !welcome;
  $("timeline").classList.toggle("cannot", !welcome?.can_rewind);
  if (welcome && !welcome.can_rewind) {
    $("when").textContent = "This model can’t rewind: its pictures depend on those before. Fork instead.";
    return;
  }
  $("past").min = made - undo;
  $("past").max = made;
  if (!dragging) $("past").value = made;
  const seconds = (made - $("past").value) / (welcome?.fps ?? 16);
  $("when").textContent = dragging ? `− ${seconds.toFixed(1)} s` : `${(made / (welcome?.fps ?? 16)).toFixed(0)} s`;
}

// What people do

function button(text, follow) {
  const made = document.createElement("button");
  made.textContent = text;
  made.type = "button";
  made.onclick = follow;
  return made;
}

function item(...parts) {
  const made = document.createElement("li");
  made.append(...parts);
  return made;
}

function example(text) {
  const chip = button(text, () => say(text));
  chip.className = "chip";
  return chip;
}

function say(text) {
  if (text.trim()) request("prompt", { text: text.trim(), recache: $("recache").checked });
}

function steer(wanted) {
  request("steer", { worlds: wanted });
}

$("say").onsubmit = (event) => {
  event.preventDefault();
  say($("words").value);
  $("words").blur();
};
$("pause").onclick = () => request(state.paused ? "resume" : "pause");
$("step").onclick = () => request("step");
$("fork").onclick = () => request("fork");
$("both").onclick = () => steer(state.steered.length > 1 ? ["b"] : ["a", "b"]);
$("save").onclick = () => link.request("save").then(({ name }) => note(`saved as ${name}`)).catch((error) => note(error.message, true));
$("record").onclick = () => request("record", { on: !state.recording }).then((made) => made?.frames && note(`${made.name}: under Files`));
$("reset").onclick = $("restart").onclick = () => request("reset", { seed: Number($("seed").value) || 0 });
$("profile").onchange = () => request("profile", { level: $("profile").checked ? "layer" : "block" });
$("show-files").onclick = () => $("files").showModal();
$("show-figures").onclick = () => {
  $("figures").hidden = !$("figures").hidden;
  $("show-figures").setAttribute("aria-pressed", String(!$("figures").hidden));
  document.body.classList.toggle("figures", !$("figures").hidden);
};
$("fullscreen").onclick = () => (document.fullscreenElement ? document.exitFullscreen() : document.documentElement.requestFullscreen());
for (const figure of worlds) {
  const name = figure.dataset.world;
  figure.querySelector("canvas").onclick = figure.querySelector(".steer").onclick = () => state.worlds.length > 1 && driving() && steer([name]);
  figure.querySelector(".close").onclick = () => request("close", { world: name });
}

let resume = false;
let dropping = false;
$("past").addEventListener("input", () => {
  if (!dragging) {
    dragging = true;
    resume = !state.paused;
    if (resume) request("pause");
  }
  for (const world of state.steered) screen.preview(world, Number($("past").value));
  timeline();
});
// Dropped where it was taken up, the slider tells of no change, only of a finger that has left it.
async function drop() {
  if (!dragging || dropping) return;
  dropping = true;
  const frame = Number($("past").value);
  if (frame < Number($("past").max)) await request("rewind", { frame });
  dragging = dropping = false;
  $("past").blur();
  timeline();
  if (resume) request("resume");
}
$("past").addEventListener("change", drop);
for (const end of ["pointerup", "pointercancel"]) addEventListener(end, drop);

const SHORTCUTS = { p: "pause", ".": "step", f: "fork", b: "both", h: "show-figures" };
addEventListener("keydown", (event) => {
  if (event.target.closest?.("input:not([type=range]):not([type=checkbox]), textarea, dialog") || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.toLowerCase();
  if (key === "/") {
    event.preventDefault();
    $("words").focus();
  } else if (/^[1-9]$/.test(key)) {
    $("examples").children[key - 1]?.click();
  } else if (key in SHORTCUTS && !(key in pads.keys)) {
    const target = $(SHORTCUTS[key]);
    if (!target.disabled && !target.hidden) target.click();
  }
});
pads.addEventListener("change", () => {
  const held = new Set(pads.held.map(([, action]) => action));
  for (const arrow of $("pad").querySelectorAll("[data-action]")) arrow.classList.toggle("on", held.has(arrow.dataset.action));
});
if (matchMedia("(min-width: 1100px)").matches) $("show-figures").click();
render();

// For tests, which read what people see.
window.inferix = { link, screen, pads, figures, state: () => state, blocks };
