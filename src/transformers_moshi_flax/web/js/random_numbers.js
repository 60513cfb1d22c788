// The random numbers of `jax.random`: a seed says the same in every runtime. Threefry-2x32 of 20 rounds (Salmon et
// al., 2011), with the counters that JAX has with `jax_threefry_partitionable`.

const ROTATIONS = [
  [13, 15, 26, 6],
  [17, 29, 16, 24],
];

/**
 * The two words for a counter of two words.
 *
 * @param {[number, number]} key of 32 bits each, as is what is returned.
 * @param {number} high of the counter.
 * @param {number} low of the counter.
 * @returns {[number, number]}
 */
export function threefry([first, second], high, low) {
  const keys = [first, second, first ^ second ^ 0x1bd11bda];
  let x = (high + first) | 0;
  let y = (low + second) | 0;
  for (let group = 0; group < 5; group++) {
    for (const rotation of ROTATIONS[group % 2]) {
      x = (x + y) | 0;
      y = ((y << rotation) | (y >>> (32 - rotation))) ^ x;
    }
    x = (x + keys[(group + 1) % 3]) | 0;
    y = (y + keys[(group + 2) % 3] + group + 1) | 0;
  }
  return [x, y];
}

/**
 * What the steps of a dialogue draw.
 *
 * @typedef {{input: string, stream: number, part: number | null, count: number}} Draw its name, which of the step's
 *   draws it is, the part of a key that is split in two, numbers for each row.
 */
export class UniformNumbers {
  /**
   * @param {Draw[]} draws of a step.
   * @param {number} rows of the batch.
   * @param {number} seed of all, a whole number of at least 0.
   */
  constructor(draws, rows, seed) {
    this.draws = draws;
    /** @type {[number, number]} */
    const key = [Math.floor(seed / 2 ** 32) | 0, seed | 0];
    this.keys = Array.from({ length: rows }, (_, row) => threefry(key, 0, row));
  }

  /**
   * The numbers of a step, in [0, 1), by the names of the inputs: row after row.
   *
   * @param {number} step
   * @returns {Record<string, Float32Array>}
   */
  ofStep(step) {
    const keys = this.keys.map((key) => threefry(key, 0, step));
    return Object.fromEntries(
      this.draws.map(({ input, stream, part, count }) => {
        const numbers = new Float32Array(this.keys.length * count);
        keys.forEach((ofRow, row) => {
          let key = threefry(ofRow, 0, stream);
          if (part !== null) key = threefry(key, 0, part);
          for (let at = 0; at < count; at++) {
            const [high, low] = threefry(key, 0, at);
            numbers[row * count + at] = ((high ^ low) >>> 9) * 2 ** -23;
          }
        });
        return [input, numbers];
      }),
    );
  }
}
