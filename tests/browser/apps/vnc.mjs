// noVNC in front of a VNC server: the browser speaks RFB over a WebSocket.
import net from "node:net";
import { once } from "node:events";
import { spawn } from "node:child_process";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { WebSocketServer } from "ws";
import { close, files, page, serve } from "./http.mjs";

export const port = 39380;
const novnc = path.dirname(path.dirname(fileURLToPath(import.meta.resolve("@novnc/novnc"))));

const PAGE = `<!doctype html><div id="screen"></div><script type="module">
import RFB from "/novnc/core/rfb.js";
const rfb = new RFB(document.getElementById("screen"),
  location.origin.replace("http", "ws") + "/websockify", {});
rfb.addEventListener("connect", () => { window.connected = true; });
</script>`;

export async function start({ ip, dir }) {
  const socket = path.join(dir, "vnc.sock");
  const display = `:${(process.pid % 20_000) + 100}`;
  const screen = spawn(
    "Xvnc",
    [display, "-rfbunixpath", socket, "-rfbport", "-1", "-SecurityTypes", "None", "-geometry", "640x480",
      "-nolisten", "tcp"],
    { stdio: "ignore" },
  );
  const server = await serve(ip, port, (request, response) =>
    request.url === "/" ? page(response, PAGE) : files({ novnc }, request, response));
  const sockets = new WebSocketServer({ server, path: "/websockify" });
  sockets.on("connection", async (client) => {
    const upstream = net.connect(socket);
    await once(upstream, "connect");
    upstream.on("data", (data) => client.send(data));
    upstream.on("close", () => client.close());
    client.on("message", (data) => upstream.write(data));
    client.on("close", () => upstream.destroy());
  });
  return { stop: () => { screen.kill("SIGKILL"); close(server); } };
}

export async function check({ framed, url }) {
  const frame = await framed(`${url}/`);
  await frame.waitForFunction(() => window.connected === true, { timeout: 30_000 });
  await frame.waitForFunction(
    () => document.querySelector("canvas")?.width === 640, { timeout: 30_000 });
}
