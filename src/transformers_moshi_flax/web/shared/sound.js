// Sound in and out, and how loud it is. Frames are of 16 bits, 80 ms each.

export const RATE = 24000;
export const FRAME_SIZE = 1920;
export const FRAME_SECONDS = FRAME_SIZE / RATE;

/** Microphone and loudspeaker, which outlive a lost connection. */
export class Sound {
  /**
   * @param {boolean} listens whether there is to be a microphone.
   * @throws {Error} whose message can be shown, if there is no microphone or no way to hear it.
   */
  static async open(listens = true) {
    if (!navigator.mediaDevices || !window.AudioWorkletNode) {
      throw new Error("This page cannot use the microphone here: open it over https, or as localhost.");
    }
    const sound = new Sound();
    if (listens) sound.stream = await microphone();
    try {
      sound.context = new AudioContext({ sampleRate: RATE });
      await sound.context.audioWorklet.addModule("worklets.js");
      await sound.context.resume();
      sound.player = new AudioWorkletNode(sound.context, "player", { numberOfInputs: 0, outputChannelCount: [1] });
      sound.player.connect(sound.context.destination);
      if (listens) {
        sound.microphone = new AudioWorkletNode(sound.context, "microphone", { numberOfOutputs: 0 });
        sound.context.createMediaStreamSource(sound.stream).connect(sound.microphone);
      }
    } catch (error) {
      sound.close();
      throw new Error(`This browser cannot record at 24 kHz (${error.message}). Try a recent Chrome, Edge or Safari.`);
    }
    return sound;
  }

  close() {
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.context?.close();
  }
}

/** @throws {Error} whose message can be shown, if there is none. */
async function microphone() {
  try {
    return await navigator.mediaDevices.getUserMedia({
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
}

/** How loud a frame is, in [0, 1]. */
export function level(frame) {
  let sum = 0;
  for (const sample of frame) sum += sample * sample;
  return Math.min(1, (4 * Math.sqrt(sum / frame.length)) / 32768);
}
