// Holds dialogues with an export: what was made of every frame, as JSON; or what was refused.
// Arguments: the modules of ONNX Runtime and of OnnxMoshi, the export, a file of float32 samples, options of each
// dialogue as JSON.

import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";

const [runtime, module, folder, recording, options] = process.argv.slice(2);
const ort = await import(pathToFileURL(runtime));
const { OnnxMoshi } = await import(pathToFileURL(module));
ort.env.wasm.numThreads = 1;

const base64 = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString("base64");

async function hold(moshi, heard, { seed, numbers, forced }) {
  const stream = await moshi.streaming({ seed, ...numbers });
  const size = moshi.batchSize * moshi.channels * moshi.frameSize;
  const frames = [];
  for (let at = 0; at < heard.length / size; at++) {
    const frame = await stream.step(heard.slice(at * size, (at + 1) * size), forced?.[at]);
    frames.push({
      textIds: [...frame.textIds],
      audioCodes: [...frame.audioCodes],
      text: frame.text,
      audio: base64(frame.audio),
    });
  }
  return frames;
}

const refused = ({ name, message }) => ({ refused: `${name}: ${message}` });

try {
  const sizes = [];
  const moshi = await OnnxMoshi.load(ort, folder, { progress: (...size) => sizes.push(size) });
  const heard = new Float32Array((await readFile(recording)).buffer);
  const dialogues = [];
  for (const given of JSON.parse(options)) {
    dialogues.push(await hold(moshi, heard, given).then((frames) => ({ frames }), refused));
  }
  await moshi.release();
  console.log(JSON.stringify({ dialogues, progress: sizes.at(-1) }));
} catch (error) {
  console.log(JSON.stringify(refused(error)));
}
