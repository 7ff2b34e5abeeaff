// A Vite development server: refuses unknown hosts, and pushes changes over a WebSocket of its own.
import { mkdir, writeFile } from "node:fs/promises";
import path from "node:path";
import { createServer } from "vite";

export const port = 5173;

export async function start({ ip, dir }) {
  const root = path.join(dir, "vite");
  await mkdir(root, { recursive: true });
  await writeFile(path.join(root, "index.html"),
    `<!doctype html><p id="text"></p><script type="module" src="/main.js"></script>`);
  await writeFile(path.join(root, "main.js"),
    `import { text } from "./text.js";
     const show = (text) => { document.getElementById("text").textContent = text; };
     window.loads = (window.loads ?? 0) + 1;
     show(text);
     import.meta.hot.accept("./text.js", (fresh) => show(fresh.text));`);
  const change = (text) =>
    writeFile(path.join(root, "text.js"), `export const text = ${JSON.stringify(text)};`);
  await change("before");
  const server = await createServer({
    root, configFile: false, logLevel: "error", cacheDir: path.join(dir, "vite-cache"),
    server: { host: ip, port, strictPort: true },
  });
  await server.listen();
  return { stop: () => server.close(), change };
}

export async function check({ framed, url, started }) {
  const frame = await framed(`${url}/`);
  const shows = (text) => frame.waitForFunction(
    (text) => document.getElementById("text")?.textContent === text, { timeout: 30_000 }, text);
  await shows("before");
  await frame.evaluate(() => { window.sameDocument = true; });
  await started.change("after");
  await shows("after");
  if (!(await frame.evaluate(() => window.sameDocument === true))) {
    throw new Error("the page was loaded again, so the change did not come over the WebSocket");
  }
}
