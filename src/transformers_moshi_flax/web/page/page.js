// The page: a button to talk, one to ask a recorded question, what Moshi says, and what is wrong if something is.

import { Dialogue, Question } from "./dialogue.js";
import { save } from "./saving.js";
import { FRAME_SECONDS, Sound, level } from "./sound.js";
import { Transcript } from "./transcript.js";

const LABELS = {
  temperature: "Temperature of the text",
  top_k: "Top-k of the text",
  top_p: "Top-p of the text",
  depth_decoder_temperature: "Temperature of the audio",
  depth_decoder_top_k: "Top-k of the audio",
  depth_decoder_top_p: "Top-p of the audio",
};

const $ = (id) => document.getElementById(id);
const transcript = new Transcript($("transcript"));

let worker = null;
let sound = null;
let dialogue = null;
let question = null; // of the button; null where the folder has none

function show(element, words) {
  element.textContent = words;
  element.hidden = !words;
}

/** Loads the model; `site` says what the folder has. */
export async function open(site) {
  show($("notice"), site.notice ?? "");
  $("ask").hidden = !site.question;
  if (site.question) question = new Question(site.question);
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = ({ data }) => receive(data, site);
  worker.onerror = ({ message }) => lose(`What runs Moshi has failed (${message}). Reload the page.`);
  worker.postMessage({ load: site.runtime });
}

function receive(message, site) {
  const { progress, ready, failed } = message;
  if (progress) {
    const [done, total] = progress;
    $("loaded").value = done / total;
    $("megabytes").textContent = `${(done / 1e6).toFixed(0)} of ${(total / 1e6).toFixed(0)} MB`;
    if (done === total) show($("status"), "Getting ready …");
  } else if (ready) {
    $("loading").hidden = true;
    offerSettings(ready.numbers, ready.bounds);
    finish("");
    keepForOffline(site);
  } else if (failed) lose(failed);
  else dialogue?.receive(message);
}

/** Nothing goes on without a reload. */
function lose(problem) {
  worker.terminate();
  $("loading").hidden = true;
  finish(problem);
  $("talk").disabled = $("ask").disabled = true;
  show($("status"), "Moshi is not running.");
}

function offerSettings(numbers, bounds) {
  $("choosing").hidden = !Object.keys(numbers).length;
  for (const [name, number] of Object.entries(numbers)) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    label.htmlFor = input.id = name;
    label.textContent = LABELS[name] ?? name;
    const whole = name in bounds;
    Object.assign(input, { type: "number", min: whole ? 1 : 0.05, step: whole ? 1 : 0.05 });
    if (whole) input.max = bounds[name];
    input.placeholder = Number(number.toFixed(3));
    $("settings").append(label, input);
  }
}

function chosen() {
  const inputs = [...$("settings").querySelectorAll("input")].filter((input) => input.value);
  return Object.fromEntries(inputs.map((input) => [input.id, Number(input.value)]));
}

/** A copy of all files stays with the browser, so that the page opens without a network. */
async function keepForOffline({ kept }) {
  try {
    await navigator.serviceWorker.register("service_worker.js");
    await navigator.serviceWorker.ready;
    $("offline").textContent = `This page is kept on your device (${kept} MB) and opens without a network too.`;
  } catch {
    $("offline").textContent = "This browser does not keep the page: it opens with a network only.";
  }
}

async function start(asks) {
  show($("problem"), "");
  $("talk").disabled = $("ask").disabled = true;
  show($("status"), asks ? "Opening the loudspeaker …" : "Opening the microphone …");
  try {
    if (asks) await question.load();
    sound = await Sound.open(!asks);
  } catch (error) {
    return finish(error.message);
  }
  const events = {
    open: () => show($("status"), asks ? "Moshi hears the recorded question." : "Listening: speak."),
    words: (words, seconds) => {
      transcript.add(words, seconds);
      $("save-text").disabled = false;
    },
    heard: (frame) => ($("user-level").value = level(frame)),
    said: (frame) => {
      $("moshi-level").value = level(frame);
      $("save").disabled = false;
    },
    figures: ({ milliseconds, delay, gaps, leftOut }) => {
      $("figures").textContent =
        `a frame takes ${Math.round(milliseconds)} of ${1000 * FRAME_SECONDS} ms, ` +
        `waiting sound ${Math.round(1000 * delay)} ms, gaps ${gaps}, frames left out ${leftOut}`;
    },
    closed: finish,
  };
  transcript.clear();
  $("save").disabled = $("save-text").disabled = true;
  setTalking(true);
  // a recorded question is answered the same every time
  const seed = asks ? 0 : crypto.getRandomValues(new Uint32Array(1))[0];
  dialogue = new Dialogue(worker, sound, { seed, numbers: chosen() }, events, asks ? question : null);
}

function setTalking(talking) {
  $("talk").disabled = false;
  $("talk").textContent = talking ? "Stop" : "Talk";
  $("talk").classList.toggle("stop", talking);
  $("ask").disabled = talking;
  $("levels").hidden = !talking;
}

function finish(problem) {
  sound?.close();
  sound = null;
  setTalking(false);
  show($("status"), "Ready.");
  show($("problem"), problem);
}

$("talk").addEventListener("click", () => (sound ? dialogue.end("") : start(false)));
$("ask").addEventListener("click", () => start(true));
$("save").addEventListener("click", () => save(dialogue.recording(), "moshi.wav"));
$("save-text").addEventListener("click", () => save(transcript.text(), "moshi.txt"));
