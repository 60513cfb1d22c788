// Dialogues with an exported Moshi: Mimi's encoder, a frame of Moshi, Mimi's decoder, 80 ms after 80 ms.

import { BadExport, Files } from "./files.js";
import { UniformNumbers } from "./random_numbers.js";
import { Tokenizer } from "./tokenizer.js";

export { BadExport };

const NEXT = "next."; // begins the names of outputs that are the next state
const ENCODE = "mimi_encode_step";
const CONVERSE = "moshi_step";
const DECODE = "mimi_decode_step";
const ARRAYS = {
  bool: Uint8Array,
  float32: Float32Array,
  int32: Int32Array,
  int64: BigInt64Array,
  uint32: Uint32Array,
};

/**
 * Moshi's side of the 80 ms whose user's side was passed, row after row.
 *
 * @typedef {object} Frame
 * @property {Float32Array} audio `batchSize × channels × frameSize`.
 * @property {string[]} text what each dialogue's text grows by.
 * @property {Int32Array} textIds the text token of each.
 * @property {Int32Array} audioCodes their codes, undelayed, `batchSize × numCodebooks`.
 * @property {Float32Array} textLogits of the text token that this step chose, the next frame's,
 *   `batchSize × vocabSize`.
 */

/** A model that `moshi-flax export` wrote, on an ONNX Runtime; made by `OnnxMoshi.load`. */
export class OnnxMoshi {
  /**
   * Loads an export.
   *
   * @param {any} ort the module `onnxruntime-web` or `onnxruntime-node`.
   * @param {URL | string} place address of the folder; in Node also its path.
   * @param {object} [options]
   * @param {import("./files.js").Progress} [options.progress] told while files are read.
   * @param {object} [options.session] options of ONNX Runtime's sessions, such as `executionProviders`.
   * @returns {Promise<OnnxMoshi>}
   * @throws {BadExport} the folder is no export, of another version, or damaged.
   */
  static async load(ort, place, { progress, session = {} } = {}) {
    const files = new Files(place, progress);
    const manifest = await files.manifest();
    const moshi = new OnnxMoshi(ort, manifest);
    const rest = new Set(Object.keys(manifest.files));
    for (const [name, step] of Object.entries(manifest.steps)) {
      const graph = await files.read(step.file);
      const weights = Object.keys(manifest.files).filter((file) => file.startsWith(`${step.file}.`));
      const externalData = [];
      for (const path of weights) externalData.push({ path, data: await files.read(path) });
      for (const file of [step.file, ...weights]) rest.delete(file);
      // ONNX Runtime's library for Node reads the weights beside the graph by itself
      moshi.sessions[name] =
        ort.env.versions?.node && files.inFolder
          ? await ort.InferenceSession.create(await files.path(step.file), session)
          : await ort.InferenceSession.create(graph, { ...session, externalData });
    }
    for (const name of rest) {
      const bytes = await files.read(name);
      if (name === "tokenizer.json") moshi.tokenizer = new Tokenizer(JSON.parse(new TextDecoder().decode(bytes)));
    }
    return moshi;
  }

  /**
   * @param {any} ort
   * @param {any} manifest
   */
  constructor(ort, manifest) {
    this.ort = ort;
    /** All that is known of the export. */
    this.manifest = manifest;
    /** @type {Record<string, any>} */
    this.sessions = {};
    /** @type {Tokenizer | null} */
    this.tokenizer = null;
    /** Dialogues at once. @type {number} */
    this.batchSize = manifest.batch_size;
    /** Samples of a frame. @type {number} */
    this.frameSize = manifest.frame_size;
    /** Samples a second. @type {number} */
    this.samplingRate = manifest.sampling_rate;
    /** Frames a second. @type {number} */
    this.frameRate = manifest.frame_rate;
    /** Of the audio. @type {number} */
    this.channels = manifest.channels;
    /** Codes of a frame. @type {number} */
    this.numCodebooks = manifest.num_codebooks;
    /** Of the text. @type {number} */
    this.vocabSize = manifest.vocab_size;
    /**
     * Of sampling, by name, as dialogues begin with; none where the export is greedy.
     *
     * @type {Record<string, number>}
     */
    this.numbers = manifest.sampling;
  }

  /**
   * Endless dialogues, `batchSize` of them.
   *
   * @param {{seed?: number} & Record<string, number>} [options] the seed of what is drawn (0), and numbers of
   *   sampling, others than `numbers`.
   * @returns {Promise<OnnxMoshiStream>}
   * @throws {RangeError} a number that the export does not have, or that is out of range.
   */
  async streaming({ seed = 0, ...numbers } = {}) {
    if (!Number.isSafeInteger(seed) || seed < 0) {
      throw new RangeError(`\`seed\` must be a whole number of at least 0, but is ${seed}.`);
    }
    const stream = new OnnxMoshiStream(this, seed, { ...this.numbers, ...this.checked(numbers) });
    await stream.begin();
    return stream;
  }

  /** @param {Record<string, number>} numbers */
  checked(numbers) {
    for (const [name, number] of Object.entries(numbers)) {
      if (!(name in this.numbers)) {
        const has = Object.keys(this.numbers).join(", ") || "none, as it is greedy";
        throw new RangeError(`The export was made without \`${name}\`; its numbers are: ${has}.`);
      }
      if (!(Number.isFinite(number) && number > 0)) {
        throw new RangeError(`\`${name}\` must be a number above 0, but is ${number}.`);
      }
      const bound = this.manifest.bounds[name];
      if (bound !== undefined && !(Number.isInteger(number) && number <= bound)) {
        throw new RangeError(`\`${name}\` must be a whole number in [1, ${bound}], but is ${number}.`);
      }
      if (name.endsWith("_p") && number > 1) throw new RangeError(`\`${name}\` must be in (0, 1], but is ${number}.`);
    }
    return numbers;
  }

  /** Gives the memory back. */
  async release() {
    for (const session of Object.values(this.sessions)) await session.release();
  }
}

/** Dialogues that are held; made by `OnnxMoshi.streaming`. */
export class OnnxMoshiStream {
  /**
   * @param {OnnxMoshi} model
   * @param {number} seed
   * @param {Record<string, number>} numbers
   */
  constructor(model, seed, numbers) {
    const { steps } = model.manifest;
    this.model = model;
    this.uniforms = new UniformNumbers(steps[CONVERSE].uniforms, model.batchSize, seed);
    this.position = 0;
    this.busy = false;
    this.words = Array.from({ length: model.batchSize }, () => model.tokenizer?.words());
    /** Everything that goes into each step: what stays the same, and the state. @type {Record<string, any>} */
    this.feeds = {};
    for (const [name, step] of Object.entries(steps)) {
      const fixed = name === CONVERSE ? Object.entries(numbers) : [];
      this.feeds[name] = Object.fromEntries([
        ...step.state.map((/** @type {any} */ entry) => [entry.name, this.filled(entry, entry.initial)]),
        ...fixed.map(([input, number]) => [input, this.filled(step.inputs[input], number)]),
      ]);
    }
  }

  /** The start frame, in which nothing is heard or said. */
  async begin() {
    const nothing = new Int32Array(this.model.batchSize * this.model.numCodebooks);
    await this.converse(nothing, this.unforced("forced_ids"), this.unforced("forced_codes"));
  }

  /**
   * Hears 80 ms of every user and says 80 ms to each.
   *
   * @param {Float32Array} audio in [-1, 1], `batchSize × channels × frameSize`.
   * @param {object} [forced]
   * @param {Int32Array} [forced.textIds] text tokens of the frame after the one that is returned, -1 where Moshi
   *   chooses.
   * @param {Int32Array} [forced.audioCodes] its codes, undelayed, -1 where Moshi chooses.
   * @returns {Promise<Frame>}
   * @throws {RangeError} another number of samples or tokens, or ones that cannot be.
   * @throws {Error} the step before has not ended.
   */
  async step(audio, { textIds, audioCodes } = {}) {
    const { model } = this;
    if (this.busy) throw new Error("The step before has not ended: await it.");
    const expected = model.batchSize * model.channels * model.frameSize;
    if (audio.length !== expected || !audio.every(Number.isFinite)) {
      throw new RangeError(`\`audio\` must be ${expected} finite numbers, but has ${audio.length} samples.`);
    }
    const forcedIds = this.forced("textIds", textIds, "forced_ids", model.vocabSize);
    const forcedCodes = this.forced("audioCodes", audioCodes, "forced_codes", model.manifest.audio_vocab_size);
    this.busy = true;
    try {
      const heard = await this.run(ENCODE, { audio });
      const said = await this.converse(heard.user_codes, forcedIds, forcedCodes);
      const spoken = await this.run(DECODE, { audio_codes: said.audio_codes });
      return {
        audio: spoken.audio,
        text: this.words.map((words, row) => words?.put(said.text_ids[row]) ?? ""),
        textIds: said.text_ids,
        audioCodes: said.audio_codes,
        textLogits: said.text_logits,
      };
    } finally {
      this.busy = false;
    }
  }

  /**
   * @param {Int32Array} userCodes
   * @param {Int32Array} forcedIds
   * @param {Int32Array} forcedCodes
   */
  converse(userCodes, forcedIds, forcedCodes) {
    const uniforms = this.uniforms.ofStep(this.position++);
    return this.run(CONVERSE, {
      user_codes: userCodes,
      forced_ids: forcedIds,
      forced_codes: forcedCodes,
      ...uniforms,
    });
  }

  /**
   * Runs a graph and keeps the next state.
   *
   * @param {string} name
   * @param {Record<string, any>} inputs arrays of numbers.
   * @returns {Promise<Record<string, any>>}
   */
  async run(name, inputs) {
    const described = this.model.manifest.steps[name];
    const feeds = this.feeds[name];
    for (const [input, numbers] of Object.entries(inputs)) {
      feeds[input] = this.tensor(described.inputs[input], numbers);
    }
    const made = await this.model.sessions[name].run(feeds);
    for (const { name: entry } of described.state) feeds[entry] = made[NEXT + entry];
    return Object.fromEntries(Object.keys(described.outputs).map((output) => [output, made[output].data]));
  }

  /** @param {string} input */
  unforced(input) {
    const { shape } = this.model.manifest.steps[CONVERSE].inputs[input];
    return new Int32Array(elements(shape)).fill(-1);
  }

  /**
   * @param {string} name
   * @param {Int32Array | undefined} given
   * @param {string} input
   * @param {number} size
   */
  forced(name, given, input, size) {
    const free = this.unforced(input);
    if (given === undefined) return free;
    if (given.length !== free.length || !given.every((id) => Number.isInteger(id) && id >= -1 && id < size)) {
      throw new RangeError(`\`${name}\` must be ${free.length} whole numbers in [-1, ${size}).`);
    }
    return Int32Array.from(given);
  }

  /**
   * @param {{shape: number[], dtype: string}} described
   * @param {number} number
   */
  filled({ shape, dtype }, number) {
    if (!(dtype in ARRAYS)) throw new BadExport(`The export has numbers of the type ${dtype}: use a newer runtime.`);
    const array = new ARRAYS[/** @type {keyof ARRAYS} */ (dtype)](elements(shape));
    const value = array instanceof BigInt64Array ? BigInt(number) : Number(number);
    return this.tensor({ shape, dtype }, array.fill(/** @type {never} */ (value)));
  }

  /**
   * @param {{shape: number[], dtype: string}} described
   * @param {any} numbers
   */
  tensor({ shape, dtype }, numbers) {
    return new this.model.ort.Tensor(dtype, numbers, shape);
  }
}

/** @param {number[]} shape */
function elements(shape) {
  return shape.reduce((product, size) => product * size, 1);
}
