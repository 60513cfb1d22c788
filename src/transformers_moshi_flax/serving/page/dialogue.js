// One dialogue: the microphone to the server, the server to the loudspeaker, and both to a recording.

import { recording } from "./saving.js";
import { FRAME_SECONDS, RATE } from "./sound.js";

const KIND = { handshake: 0, audio: 1, text: 2, control: 3, metadata: 4, error: 5, ping: 6 };

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

  /** Both voices as a WAV. */
  recording() {
    return recording(this.moshi, this.user);
  }
}
