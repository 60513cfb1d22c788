// The page: one button, what Moshi says, and what is wrong if something is.

import { Dialogue } from "./dialogue.js";
import { save } from "./saving.js";
import { Sound, level } from "./sound.js";
import { Transcript } from "./transcript.js";

const RETRIES = [1, 2, 4, 8, 8]; // seconds before each attempt to come back

const $ = (id) => document.getElementById(id);
const transcript = new Transcript($("transcript"));
const SETTINGS = ["text_temperature", "text_topk", "audio_temperature", "audio_topk"];

let sound = null;
let dialogue = null;
let retries = 0;
let retryTimer = null;

function show(element, words) {
  element.textContent = words;
  element.hidden = !words;
}

function setTalking(talking) {
  $("talk").textContent = talking ? "Stop" : "Talk";
  $("talk").classList.toggle("stop", talking);
  $("levels").hidden = !talking;
}

function query() {
  const values = new URLSearchParams({ format: "pcm16" });
  if ($("token").value) values.set("token", $("token").value);
  for (const name of SETTINGS) if ($(name).value) values.set(name, $(name).value);
  return values;
}

/** Why the server did not open the websocket: browsers do not say, a plain request does. */
async function refusal() {
  try {
    const answer = await fetch(`api/chat?${query()}`);
    return { status: answer.status, words: await answer.text() };
  } catch {
    return { status: 0, words: "" };
  }
}

async function start() {
  show($("problem"), "");
  $("talk").disabled = true;
  show($("status"), "Opening the microphone …");
  try {
    sound ??= await Sound.open();
  } catch (error) {
    finish(error.message);
    return;
  } finally {
    $("talk").disabled = false;
  }
  retries = 0;
  connect();
}

function connect() {
  retryTimer = null;
  show($("status"), "Connecting …");
  setTalking(true);
  $("save").disabled = true;
  $("save-text").disabled = true;
  let told = "";
  const url = new URL(`api/chat?${query()}`, location.href);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  dialogue = new Dialogue(sound, url, {
    queued: (position) => {
      retries = 0;
      show($("problem"), "");
      show($("status"), `All places are taken. You are number ${position} in the queue.`);
    },
    open: () => {
      retries = 0;
      $("token-form").hidden = true;
      transcript.clear();
      show($("problem"), "");
      show($("status"), "Connected: speak.");
    },
    words: (words, seconds) => {
      transcript.add(words, seconds);
      $("save-text").disabled = false;
    },
    heard: (frame) => ($("user-level").value = level(frame)),
    said: (frame) => {
      $("moshi-level").value = level(frame);
      $("save").disabled = false;
    },
    figures: ({ gaps, delay }) => ($("figures").textContent = `waiting sound ${Math.round(1000 * delay)} ms, gaps ${gaps}`),
    problem: (words) => show($("problem"), (told = `The server says: ${words}.`)),
    closed: (ended) => afterwards(ended, told),
  });
}

async function afterwards(ended, told) {
  if (ended.stopped) return finish("");
  if (told) return finish(told);
  if (!ended.opened) {
    const { status, words } = await refusal();
    if (!sound || dialogue !== ended) return; // Stop was pressed meanwhile
    if (status === 401) {
      $("token-form").hidden = false;
      finish("This server asks for a token.");
      $("token").focus();
      return;
    }
    // 426 is how a websocket's address answers a plain request when nothing is wrong
    if (status !== 0 && status !== 426) {
      return finish([429, 503].includes(status) ? `Not now: ${words}.` : `The server has refused: ${words}.`);
    }
  }
  if (retries >= RETRIES.length) return finish("The connection is lost. Press Talk to try again.");
  const wait = RETRIES[retries++];
  show($("status"), "Not connected.");
  show($("problem"), `The connection is lost; trying again in ${wait} s.`);
  retryTimer = setTimeout(connect, 1000 * wait);
}

function finish(problem) {
  clearTimeout(retryTimer);
  retryTimer = null;
  sound?.close();
  sound = null;
  setTalking(false);
  show($("status"), "Not connected.");
  show($("problem"), problem);
}

function toggle() {
  if (!sound) return start();
  if (retryTimer !== null || dialogue.ended) return finish("");
  dialogue.stop();
}

async function introduce() {
  try {
    const answer = await fetch(`api/build_info?${new URLSearchParams({ token: $("token").value })}`);
    if (!answer.ok) return;
    const about = await answer.json();
    $("about").textContent = `${about.model}: it listens and speaks at the same time. Use headphones.`;
    show($("notice"), [about.notice, about.recorded && "what is said here is recorded"].filter(Boolean).join("; "));
  } catch {
    // the button will tell
  }
}

$("talk").addEventListener("click", toggle);
$("save").addEventListener("click", () => save(dialogue.recording(), "moshi.wav"));
$("save-text").addEventListener("click", () => save(transcript.text(), "moshi.txt"));
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  introduce();
  start();
});
setTalking(false);
introduce();
