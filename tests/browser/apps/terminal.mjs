// xterm.js with node-pty behind a WebSocket, as a terminal page has it.
import { createRequire } from "node:module";
import path from "node:path";
import pty from "node-pty";
import { WebSocketServer } from "ws";
import { close, files, page, serve } from "./http.mjs";

export const port = 39383;
const xterm = path.join(path.dirname(createRequire(import.meta.url).resolve("@xterm/xterm")), "..");

const PAGE = `<!doctype html><link rel="stylesheet" href="/xterm/css/xterm.css">
<div id="terminal"></div><script src="/xterm/lib/xterm.js"></script><script>
const terminal = new Terminal();
terminal.open(document.getElementById("terminal"));
const socket = new WebSocket(location.origin.replace("http", "ws") + "/pty");
socket.onmessage = (event) => terminal.write(event.data);
terminal.onData((data) => socket.send(data));
window.type = (text) => socket.readyState === 1 ? (socket.send(text), true) : false;
window.screenText = () => {
  const buffer = terminal.buffer.active, lines = [];
  for (let i = 0; i < buffer.length; i++) lines.push(buffer.getLine(i).translateToString(true));
  return lines.join("\\n");
};
</script>`;

export async function start({ ip }) {
  const server = await serve(ip, port, (request, response) =>
    request.url === "/" ? page(response, PAGE) : files({ xterm }, request, response));
  const sockets = new WebSocketServer({ server, path: "/pty" });
  sockets.on("connection", (socket) => {
    const shell = pty.spawn("/bin/sh", [], { cols: 80, rows: 24 });
    shell.onData((data) => socket.send(data));
    socket.on("message", (data) => shell.write(data.toString()));
    socket.on("close", () => shell.kill());
  });
  return { stop: () => close(server) };
}

export async function check({ framed, url }) {
  const frame = await framed(`${url}/`);
  await frame.waitForFunction(() => window.type?.("echo $((6*7))-answer\n"), { timeout: 30_000 });
  await frame.waitForFunction(() => window.screenText().includes("42-answer"), { timeout: 30_000 });
}
