// What a person may keep of a dialogue.

import { RATE } from "./sound.js";

/** Both voices as a WAV: Moshi on the left, the user on the right. Frame k of one answers frame k of the other. */
export function recording(moshi, user) {
  const frames = moshi.length;
  const size = frames ? moshi[0].length : 0;
  const header = 44;
  const view = new DataView(new ArrayBuffer(header + frames * size * 4));
  const ascii = (at, text) => [...text].forEach((letter, index) => view.setUint8(at + index, letter.charCodeAt(0)));
  ascii(0, "RIFF");
  view.setUint32(4, view.byteLength - 8, true);
  ascii(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 2, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, RATE * 4, true);
  view.setUint16(32, 4, true);
  view.setUint16(34, 16, true);
  ascii(36, "data");
  view.setUint32(40, view.byteLength - header, true);
  let at = header;
  for (let frame = 0; frame < frames; frame++) {
    for (let sample = 0; sample < size; sample++, at += 4) {
      view.setInt16(at, moshi[frame][sample], true);
      view.setInt16(at + 2, user[frame]?.[sample] ?? 0, true);
    }
  }
  return new Blob([view], { type: "audio/wav" });
}

/** Has the browser save a file. */
export function save(file, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
