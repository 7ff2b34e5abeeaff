// A VS Code server: the workbench must come up inside a frame, over its WebSocket, and show a folder.
import { mkdir, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import path from "node:path";
import { program } from "./http.mjs";

export const port = 39378;
const entry = fileURLToPath(
  new URL("../vscode/node_modules/code-server/out/node/entry.js", import.meta.url),
);

export async function start({ ip, dir }) {
  const folder = path.join(dir, "workspace");
  await mkdir(folder, { recursive: true });
  await writeFile(path.join(folder, "marker-of-the-test.txt"), "hello");
  const data = path.join(dir, "vscode");
  const stop = program(
    [entry, "--auth", "none", "--bind-addr", `${ip}:${port}`, "--disable-telemetry",
      "--disable-update-check", "--disable-workspace-trust", "--user-data-dir", data],
    { env: { ...process.env, HOME: dir } },
  );
  return { stop, folder };
}

export async function check({ framed, url, started }) {
  const frame = await framed(`${url}/?folder=${encodeURIComponent(started.folder)}`);
  await frame.waitForSelector(".monaco-workbench", { timeout: 90_000 });
  // The list of files comes from the extension host, over the WebSocket.
  await frame.waitForFunction(
    () => document.body.innerText.includes("marker-of-the-test.txt"),
    { timeout: 90_000 },
  );
}
