// What comes before the page: whether this browser can run it, and whether its files are those that were exported.

const $ = (id) => document.getElementById(id);
const site = JSON.parse($("site").textContent);

/** A module that does nothing, with an instruction of SIMD. */
const SIMD = Uint8Array.of(
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
);

/** What this browser lacks, in words that can be shown; empty if it lacks nothing. */
function lacking() {
  if (typeof WebAssembly !== "object") return "This browser has no WebAssembly, which Moshi needs. Try a recent one.";
  if (!WebAssembly.validate(SIMD)) return "The WebAssembly of this browser has no SIMD. Try a recent one.";
  if (!isSecureContext) return "Browsers run this page over https or as localhost only: open it so.";
  return "";
}

/** What is wrong with the files of the page, in words that can be shown. */
async function damage() {
  for (const [name, integrity] of Object.entries(site.code)) {
    try {
      await (await fetch(name, { cache: "no-cache", integrity })).arrayBuffer();
    } catch {
      const lost = await fetch(name, { cache: "no-cache" }).then(({ ok }) => !ok, () => true);
      return lost
        ? `${name} cannot be loaded. Is the connection lost? Reload the page to try again.`
        : `${name} is not the file that was exported, so it is not used. Reload the page, or else export it again.`;
    }
  }
  return "";
}

const problem = lacking() || (await damage());
if (problem) {
  $("problem").textContent = problem;
  $("problem").hidden = false;
  $("status").textContent = "Moshi cannot run here.";
  $("loading").hidden = true;
} else {
  const { open } = await import("./page.js");
  open(site);
}
