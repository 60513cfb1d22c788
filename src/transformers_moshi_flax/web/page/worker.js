// Where Moshi runs, apart from the page, which never waits for it.
//
// Messages come in as {load}, {begin, options}, {hear, frame} and {end}, the last three with the number of a dialogue;
// and go out as {progress}, {ready}, {failed}, and with `dialogue` {begun}, {refused} or {frame, text, milliseconds}.

import { fetchBytes, sha256 } from "./moshi-onnx/files.js";
import { OnnxMoshi } from "./moshi-onnx/onnx_moshi.js";
import * as ort from "./onnxruntime-web/ort.wasm.min.mjs";

const WARM_UP = 12; // frames: browsers compile in earnest what has been used for a while

let moshi = null;
let stream = null;
let current = 0;
let queue = Promise.resolve();

self.onmessage = ({ data }) => {
  // what still waits of a dialogue that is over is not worth running
  if (data.begin || data.end) current = data.begin ?? 0;
  queue = queue.then(() => handle(data)).catch(({ message }) => postMessage({ failed: message }));
};

async function handle({ load: runtime, begin, options, hear: dialogue, frame }) {
  if (runtime) await load(runtime);
  else if (begin && begin === current) await start(begin, options);
  else if (dialogue && dialogue === current) await hear(dialogue, frame);
}

async function load({ file, bytes, sha256: wanted, model }) {
  const total = bytes + model;
  let done = 0;
  const advance = (count) => postMessage({ progress: [(done += count), total] });
  const wasm = await fetchBytes(file, advance).catch(({ message }) => {
    throw new Error(`${file} cannot be loaded (${message}). Is the connection lost? Reload the page to try again.`);
  });
  if ((await sha256(wasm)) !== wanted) {
    throw new Error(`${file} is not the file that was exported, so it is not used. Export the page again.`);
  }
  // more threads would need headers that many hosts of files do not send
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = wasm.buffer;
  moshi = await OnnxMoshi.load(ort, new URL("model/", self.location.href), {
    progress: (read) => postMessage({ progress: [bytes + read, total] }),
    session: { executionProviders: ["wasm"] },
  });
  const silence = await moshi.streaming();
  for (let step = 0; step < WARM_UP; step++) await silence.step(new Float32Array(moshi.frameSize));
  postMessage({ ready: { numbers: moshi.numbers, bounds: moshi.manifest.bounds } });
}

async function start(dialogue, { seed, numbers }) {
  try {
    stream = await moshi.streaming({ seed, ...numbers });
    postMessage({ dialogue, begun: true });
  } catch ({ message }) {
    postMessage({ dialogue, refused: message });
  }
}

async function hear(dialogue, frame) {
  const begin = performance.now();
  const said = await stream.step(Float32Array.from(frame, (sample) => sample / 32768));
  const milliseconds = performance.now() - begin;
  const sound = Int16Array.from(said.audio, (sample) => Math.max(-32768, Math.min(32767, Math.round(sample * 32768))));
  postMessage({ dialogue, frame: sound, text: said.text[0], milliseconds });
}
