// Keeps the files of the page, each compared with its checksum, so that it opens without a network. `SITE`, its
// version and its files with their checksums, is written before this when the page is exported.

const MINE = `${self.registration.scope} `; // begins the names of caches of this page, but of no other on this host
const NAME = MINE + SITE.version;

self.addEventListener("install", (event) => event.waitUntil(keep()));

async function keep() {
  const cache = await caches.open(NAME);
  // one after the other: together they would take memory, and some servers stall
  for (const [name, integrity] of Object.entries(SITE.files)) {
    const answer = await fetch(name, { cache: "no-cache", integrity });
    if (!answer.ok) throw new Error(`${name}: status ${answer.status}`);
    await cache.put(name, answer);
  }
}

// a new export takes over when no page of the old one is open
self.addEventListener("activate", (event) => event.waitUntil(forget()));

async function forget() {
  for (const name of await caches.keys()) if (name.startsWith(MINE) && name !== NAME) await caches.delete(name);
}

self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET") event.respondWith(answer(event.request));
});

async function answer(request) {
  const cache = await caches.open(NAME);
  const address = new URL(request.url);
  if (address.pathname.endsWith("/")) address.pathname += "index.html";
  return (await cache.match(address, { ignoreSearch: true })) ?? fetch(request);
}
