// Sound in and out, on the audio thread; both at 24 kHz, in frames of 80 ms (1920 samples).

const FRAME = 1920;

/** Gathers the microphone's samples into frames of 16 bits and posts them. */
class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.frame = new Int16Array(FRAME);
    this.filled = 0;
  }

  process([input]) {
    for (const sample of input[0] ?? []) {
      this.frame[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
      if (this.filled === FRAME) {
        this.port.postMessage(this.frame.slice());
        this.filled = 0;
      }
    }
    return true;
  }
}

/**
 * Plays what comes. It begins once `target` samples are there, which grow whenever they were not enough; what has
 * gathered beyond twice of that is skipped, so that a delay does not stay.
 */
class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.queue = [];
    this.offset = 0;
    this.length = 0;
    this.target = FRAME / 2;
    this.playing = false;
    this.gaps = 0;
    this.port.onmessage = ({ data }) => {
      this.queue.push(data);
      this.length += data.length;
      while (this.length > 2 * this.target + 2 * FRAME) this.skip();
      this.playing ||= this.length >= this.target;
      this.port.postMessage({ gaps: this.gaps, delay: this.length / sampleRate });
    };
  }

  skip() {
    this.length -= this.queue.shift().length - this.offset;
    this.offset = 0;
  }

  process(inputs, [[output]]) {
    for (let at = 0; at < output.length && this.playing; at++) {
      if (this.length === 0) {
        this.playing = false;
        this.gaps++;
        this.target = Math.min(this.target + FRAME / 2, 5 * FRAME);
        break;
      }
      output[at] = this.queue[0][this.offset++] / 32768;
      this.length--;
      if (this.offset === this.queue[0].length) {
        this.queue.shift();
        this.offset = 0;
      }
    }
    return true;
  }
}

registerProcessor("microphone", Microphone);
registerProcessor("player", Player);
