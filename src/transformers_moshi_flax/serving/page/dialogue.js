// One dialogue: the microphone to the server, the server to the loudspeaker, and both to a recording.

export const RATE = 24000;
export const FRAME_SECONDS = 0.08;
const KIND = { handshake: 0, audio: 1, text: 2, control: 3, metadata: 4, error: 5, ping: 6 };

/** Microphone and loudspeaker, which outlive a lost connection. */
export class Sound {
  /** @throws {Error} whose message can be shown, if there is no microphone or no way to hear it. */
  static async open() {
    if (!navigator.mediaDevices || !window.AudioWorkletNode) {
      throw new Error("This page cannot use the microphone here: open it over https, or as localhost.");
    }
    const sound = new Sound();
    try {
      sound.stream = await navigator.mediaDevices.getUserMedia({
        audio: { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true },
      });
    } catch (error) {
      const words = {
        NotAllowedError: "The microphone is not allowed for this page. Allow it in the browser, and press Talk again.",
        NotFoundError: "There is no microphone. Connect one, and press Talk again.",
        NotReadableError: "The microphone is used by another program. Close that one, and press Talk again.",
      };
      throw new Error(words[error.name] ?? `The microphone cannot be used: ${error.message}`);
    }
    try {
      sound.context = new AudioContext({ sampleRate: RATE });
      await sound.context.audioWorklet.addModule("worklets.js");
      await sound.context.resume();
      sound.microphone = new AudioWorkletNode(sound.context, "microphone", { numberOfOutputs: 0 });
      sound.player = new AudioWorkletNode(sound.context, "player", { numberOfInputs: 0, outputChannelCount: [1] });
      sound.player.connect(sound.context.destination);
      sound.context.createMediaStreamSource(sound.stream).connect(sound.microphone);
    } catch (error) {
      sound.close();
      throw new Error(`This browser cannot record at 24 kHz (${error.message}). Try a recent Chrome, Edge or Safari.`);
    }
    return sound;
  }

  close() {
    for (const track of this.stream.getTracks()) track.stop();
    this.context?.close();
  }
}

/**
 * A dialogue over one websocket. `events` has the functions queued, open, words, heard, said, figures, problem, closed.
 */
export class Dialogue {
  constructor(sound, url, events) {
    this.sound = sound;
    this.events = events;
    this.opened = false;
    this.moshi = [];
    this.user = [];
    this.socket = new WebSocket(url);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => this.receive(new Uint8Array(data));
    this.socket.onclose = () => this.end();
    sound.microphone.port.onmessage = ({ data }) => this.hear(data);
    sound.player.port.onmessage = ({ data }) => events.figures(data);
  }

  hear(frame) {
    if (!this.opened || this.socket.readyState !== WebSocket.OPEN) return;
    // what a slow line has not taken yet would only be heard late
    if (this.socket.bufferedAmount > RATE) return;
    const message = new Uint8Array(1 + frame.byteLength);
    message[0] = KIND.audio;
    message.set(new Uint8Array(frame.buffer), 1);
    this.socket.send(message);
    this.user.push(frame);
    this.events.heard(frame);
  }

  receive(message) {
    const payload = message.slice(1);
    if (message[0] === KIND.handshake) {
      this.opened = true;
      this.events.open();
    } else if (message[0] === KIND.audio) {
      const frame = new Int16Array(payload.buffer);
      this.moshi.push(frame);
      this.sound.player.port.postMessage(frame);
      this.events.said(frame);
    } else if (message[0] === KIND.text) {
      this.events.words(new TextDecoder().decode(payload), this.moshi.length * FRAME_SECONDS);
    } else if (message[0] === KIND.metadata && !this.opened) {
      this.events.queued(JSON.parse(new TextDecoder().decode(payload)).queue_position);
    } else if (message[0] === KIND.error) {
      this.events.problem(new TextDecoder().decode(payload));
    }
  }

  /** End it from this side. */
  stop() {
    this.stopped = true;
    this.socket.close();
    this.end();
  }

  end() {
    if (this.ended) return;
    this.ended = true;
    this.sound.microphone.port.onmessage = null;
    this.events.closed(this);
  }

  /** Both voices as a WAV: Moshi on the left, the user on the right. Frame k of one answers frame k of the other. */
  recording() {
    const frames = this.moshi.length;
    const size = frames ? this.moshi[0].length : 0;
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
        view.setInt16(at, this.moshi[frame][sample], true);
        view.setInt16(at + 2, this.user[frame]?.[sample] ?? 0, true);
      }
    }
    return new Blob([view], { type: "audio/wav" });
  }
}
