// One dialogue: the microphone or a recorded question to the worker, its answers to the loudspeaker, and both to a
// recording.

import { recording } from "./saving.js";
import { FRAME_SECONDS, FRAME_SIZE } from "./sound.js";

const WAITING = 12; // frames that a slow device may be behind; more would only be heard late
let dialogues = 0;

/** What the user says when there is no user. */
export class Question {
  /** @param {{file: string, silence: number}} described samples of 16 bits, and frames of silence after them. */
  constructor({ file, silence }) {
    this.file = file;
    this.silence = silence;
    this.frames = null;
  }

  /** @throws {Error} whose message can be shown. */
  async load() {
    if (this.frames) return;
    const answer = await fetch(this.file).catch(() => null);
    if (!answer?.ok) throw new Error("The recorded question cannot be loaded. Is the connection lost? Try again.");
    const samples = new Int16Array(await answer.arrayBuffer());
    const count = Math.ceil(samples.length / FRAME_SIZE) + this.silence;
    this.frames = Array.from({ length: count }, (_, at) => {
      const frame = new Int16Array(FRAME_SIZE);
      frame.set(samples.subarray(at * FRAME_SIZE, (at + 1) * FRAME_SIZE));
      return frame;
    });
  }
}

/** A dialogue with the model in the worker. `events` has the functions open, words, heard, said, figures, closed. */
export class Dialogue {
  constructor(worker, sound, options, events, question) {
    this.number = ++dialogues;
    this.worker = worker;
    this.sound = sound;
    this.events = events;
    this.question = question;
    this.opened = false;
    this.moshi = [];
    this.user = [];
    this.figures = { milliseconds: 0, delay: 0, gaps: 0, leftOut: 0 };
    sound.player.port.onmessage = ({ data }) => events.figures(Object.assign(this.figures, data));
    if (!question) sound.microphone.port.onmessage = ({ data }) => this.hear(data);
    worker.postMessage({ begin: this.number, options });
  }

  hear(frame) {
    if (!this.opened || this.ended) return;
    if (this.user.length - this.moshi.length >= WAITING) {
      this.figures.leftOut++;
      return;
    }
    this.worker.postMessage({ hear: this.number, frame });
    this.user.push(frame);
    this.events.heard(frame);
  }

  receive({ dialogue, begun, refused, frame, text, milliseconds }) {
    if (dialogue !== this.number || this.ended) return;
    if (refused) this.end(refused);
    else if (begun) {
      this.opened = true;
      this.events.open();
      if (this.question) this.ask();
    } else {
      const heard = this.user[this.moshi.length];
      this.moshi.push(frame);
      this.figures.milliseconds = milliseconds;
      if (text) this.events.words(text, this.moshi.length * FRAME_SECONDS);
      // a recorded question is to be heard too
      this.sound.player.port.postMessage(this.question ? mixed(frame, heard) : frame);
      this.events.said(frame);
      if (this.moshi.length === this.question?.frames.length) setTimeout(() => this.end(""), 500);
    }
  }

  /** Says the recorded question, as fast as somebody would. */
  ask() {
    const begin = performance.now();
    const ahead = () => {
      const { frames } = this.question;
      const due = Math.min(1 + (performance.now() - begin) / (1000 * FRAME_SECONDS), frames.length);
      // nothing is left out, however slow the device is
      while (!this.ended && this.user.length < Math.min(due, this.moshi.length + WAITING)) {
        this.hear(frames[this.user.length]);
      }
      if (this.ended || this.user.length === frames.length) clearInterval(timer);
    };
    const timer = setInterval(ahead, (1000 * FRAME_SECONDS) / 4);
  }

  /** @param {string} problem if it is one that ends the dialogue. */
  end(problem) {
    if (this.ended) return;
    this.ended = true;
    if (this.sound.microphone) this.sound.microphone.port.onmessage = null;
    this.worker.postMessage({ end: this.number });
    this.events.closed(problem);
  }

  /** Both voices as a WAV. */
  recording() {
    return recording(this.moshi, this.user);
  }
}

function mixed(one, other) {
  return one.map((sample, at) => Math.max(-32768, Math.min(32767, sample + other[at])));
}
