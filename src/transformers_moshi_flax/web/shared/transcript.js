// What Moshi says, as it is shown: lines with the time at which they begin.

const PAUSE = 0.8; // seconds after which a new line begins

function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
}

export class Transcript {
  /** @param {HTMLElement} list that the lines are shown in. */
  constructor(list) {
    this.list = list;
    this.lastWord = -Infinity;
  }

  /** Nothing is left of what was said. */
  clear() {
    this.list.replaceChildren();
    this.lastWord = -Infinity;
  }

  /**
   * @param {string} words to append.
   * @param {number} seconds since the dialogue began.
   */
  add(words, seconds) {
    if (seconds - this.lastWord > PAUSE) {
      const line = document.createElement("li");
      line.append(document.createElement("time"), document.createElement("span"));
      line.firstChild.textContent = clock(seconds);
      this.list.append(line);
    }
    this.lastWord = seconds;
    this.list.lastChild.lastChild.textContent += words;
    this.list.scrollTop = this.list.scrollHeight;
  }

  /** A file of what is shown: a line each, its time and the words. */
  text() {
    const lines = [...this.list.children].map((line) => [...line.children].map((part) => part.textContent.trim()));
    return new Blob(lines.map((parts) => `${parts.join(" ")}\n`), { type: "text/plain" });
  }
}
