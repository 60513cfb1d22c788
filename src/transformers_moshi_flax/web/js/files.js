// `moshi_export.json`, which says what a runtime has to know of an exported model, and the files that it names.

export const MANIFEST = "moshi_export.json";
const FORMAT = "moshi-export";
const FORMAT_VERSION = 1;

/** A folder is no export, or is damaged. */
export class BadExport extends Error {
  name = "BadExport";
}

/**
 * Told while files are read.
 *
 * @callback Progress
 * @param {number} done bytes so far.
 * @param {number} total bytes of all files.
 */

/** The files of an export, each compared with its checksum when it is read. */
export class Files {
  /**
   * @param {URL | string} place address of the folder; in Node also its path.
   * @param {Progress} [progress]
   */
  constructor(place, progress) {
    const name = String(place).replace(/[/\\]?$/, "/");
    const address = /^[a-z][a-z\d+.-]+:/i.test(name);
    this.inFolder = isNode() && (!address || name.startsWith("file:"));
    /** Where the files are: a path, or an address. */
    this.place = this.inFolder || address ? name : new URL(name, globalThis.location?.href).href;
    this.progress = progress ?? (() => {});
    this.done = 0;
    this.total = 0;
  }

  /**
   * Reads the manifest.
   *
   * @returns {Promise<any>}
   * @throws {BadExport} there is none, or it is none of this version.
   */
  async manifest() {
    const bytes = await this.bytes(MANIFEST);
    let manifest;
    try {
      manifest = JSON.parse(new TextDecoder().decode(bytes));
    } catch (error) {
      const { message } = /** @type {Error} */ (error);
      throw new BadExport(`${MANIFEST} is damaged (${message}): export the model again.`);
    }
    if (manifest?.format !== FORMAT) throw new BadExport(`${MANIFEST} is no manifest of an export.`);
    if (manifest.format_version !== FORMAT_VERSION) {
      throw new BadExport(
        `The export is of format version ${manifest.format_version}, but this runtime reads ${FORMAT_VERSION}: ` +
          "export the model again, or use the runtime of its version.",
      );
    }
    this.described = manifest.files;
    const sizes = Object.values(manifest.files).map((/** @type {{bytes: number}} */ file) => file.bytes);
    this.total = sizes.reduce((sum, bytes) => sum + bytes, 0);
    return manifest;
  }

  /**
   * Reads a file that the manifest names.
   *
   * @param {string} name
   * @returns {Promise<Uint8Array>}
   * @throws {BadExport} it is missing, or is not the one that was written.
   */
  async read(name) {
    const wanted = this.described[name];
    if (!wanted || /[/\\]/.test(name)) {
      throw new BadExport(`The manifest has no file ${name}: export the model again.`);
    }
    const bytes = await this.bytes(name, wanted.bytes);
    if (bytes.length !== wanted.bytes || (await sha256(bytes)) !== wanted.sha256) {
      throw new BadExport(`${name} is damaged, it has another checksum: export the model again.`);
    }
    return bytes;
  }

  /**
   * @param {string} name
   * @param {number} [expected] how many there should be.
   * @returns {Promise<Uint8Array>}
   */
  async bytes(name, expected = 0) {
    if (this.inFolder) {
      const { readFile } = await import("node:fs/promises");
      const bytes = await readFile(await this.path(name)).catch(({ message }) => {
        throw new BadExport(`The export lacks ${name} (${message}): export the model again, or use another copy.`);
      });
      this.advance(expected);
      return bytes;
    }
    return fetchBytes(this.place + name, (count) => this.advance(expected && count)).catch(({ message }) => {
      throw new BadExport(`The export lacks ${name} (${message}): export the model again, or use another copy.`);
    });
  }

  /**
   * Where a file of a folder is.
   *
   * @param {string} name
   * @returns {Promise<string>}
   */
  async path(name) {
    const { fileURLToPath } = await import("node:url");
    return this.place.startsWith("file:") ? fileURLToPath(new URL(name, this.place)) : this.place + name;
  }

  /** @param {number} count */
  advance(count) {
    this.done += count;
    if (count) this.progress(this.done, this.total);
  }
}

/**
 * What is at an address, asked for anew if it has changed since it was last fetched.
 *
 * @param {string} address
 * @param {(count: number) => void} advance told of bytes as they come.
 * @returns {Promise<Uint8Array>}
 * @throws {Error} it cannot be had.
 */
export async function fetchBytes(address, advance) {
  const answer = await fetch(address, { cache: "no-cache" });
  if (!answer.ok || !answer.body) throw new Error(`status ${answer.status}`);
  const pieces = [];
  let length = 0;
  const reader = answer.body.getReader();
  for (let { done, value } = await reader.read(); !done && value; { done, value } = await reader.read()) {
    pieces.push(value);
    length += value.length;
    advance(value.length);
  }
  const bytes = new Uint8Array(length);
  let at = 0;
  for (const piece of pieces) {
    bytes.set(piece, at);
    at += piece.length;
  }
  return bytes;
}

/**
 * SHA-256 as hexadecimal digits.
 *
 * @param {Uint8Array} bytes
 * @returns {Promise<string>}
 * @throws {Error} a page that is neither local nor over https, where browsers have no checksums.
 */
export async function sha256(bytes) {
  if (!globalThis.crypto?.subtle) {
    throw new Error("Checksums cannot be computed here: open the page over https, or as localhost.");
  }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", /** @type {BufferSource} */ (bytes)));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Whether this is Node. */
export function isNode() {
  return typeof globalThis.process?.versions?.node === "string";
}
