// Text of text ids, by a `tokenizer.json`.

import { BadExport } from "./files.js";

// 3 fills the frames without a new piece of a word, 0 announces the next word
const PADDING = [0, 3];
const WORD_START = /▁/g; // how a piece begins that begins a word
const BYTE = /^<0x([0-9A-F]{2})>$/; // a piece that is one byte of a character

/** The pieces of words that text ids are. */
export class Tokenizer {
  /**
   * @param {any} described contents of a `tokenizer.json`.
   * @throws {BadExport} it is none.
   */
  constructor(described) {
    const vocabulary = described?.model?.vocab;
    if (!vocabulary) throw new BadExport("tokenizer.json has no vocabulary: export the model again.");
    /** @type {string[]} */
    this.pieces = [];
    if (Array.isArray(vocabulary)) this.pieces = vocabulary.map(([piece]) => piece);
    else for (const [piece, id] of Object.entries(vocabulary)) this.pieces[id] = piece;
    this.silent = new Set(PADDING);
    for (const { id, content, special } of described.added_tokens ?? []) {
      this.pieces[id] = content;
      if (special) this.silent.add(id);
    }
  }

  /** What text ids add to a text, one after the other. */
  words() {
    return new Words(this);
  }
}

/** The text of one dialogue as it grows. */
export class Words {
  /** @param {Tokenizer} tokenizer */
  constructor(tokenizer) {
    this.tokenizer = tokenizer;
    this.decoder = new TextDecoder();
  }

  /**
   * What a frame's id adds to the text, with a space before it where a word begins: nothing for padding, and while a
   * character lacks bytes.
   *
   * @param {number} id
   * @returns {string}
   */
  put(id) {
    const piece = this.tokenizer.pieces[id];
    if (piece === undefined || this.tokenizer.silent.has(id)) return "";
    const byte = BYTE.exec(piece);
    if (byte) return this.decoder.decode(Uint8Array.of(parseInt(byte[1], 16)), { stream: true });
    this.decoder = new TextDecoder(); // a character that was left incomplete is none
    return piece.replace(WORD_START, " ");
  }
}
