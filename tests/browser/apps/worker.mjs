// Socket.IO, as the worker speaks it: the page of another site connects across origins, begins by polling,
// upgrades to a WebSocket, and connects again after its connection was cut.
import { createRequire } from "node:module";
import path from "node:path";
import { Server } from "socket.io";
import { close, serve } from "./http.mjs";

export const port = 9776;
export const client = path.join(
  path.dirname(createRequire(import.meta.url).resolve("socket.io-client/package.json")), "dist");

export async function start({ ip }) {
  const server = await serve(ip, port, (request, response) => {
    if (!request.url.startsWith("/socket.io/")) response.writeHead(404).end();
  });
  const io = new Server(server, { cors: { origin: "*" } });
  io.on("connection", (socket) => {
    socket.on("echo", (text, answer) => answer(`${socket.conn.transport.name} ${text}`));
    socket.on("cut", () => socket.conn.close());
  });
  return { stop: () => { io.close(); close(server); } };
}

export async function check({ parent, url }) {
  await parent.addScriptTag({ url: "/socket.io-client/socket.io.js" });
  await parent.evaluate((url) => {
    window.socket = window.io(url);
    window.connects = 0;
    window.socket.on("connect", () => { window.connects += 1; });
  }, url);
  const echoes = (transport) => parent.waitForFunction(
    async (transport) => {
      const answer = await window.socket.timeout(2000).emitWithAck("echo", "hello").catch(() => "");
      return answer === `${transport} hello`;
    },
    { timeout: 30_000, polling: 100 }, transport);
  await echoes("websocket");
  await parent.evaluate(() => window.socket.emit("cut"));
  await parent.waitForFunction(() => window.connects >= 2, { timeout: 30_000 });
  await echoes("websocket");
  await parent.evaluate(() => window.socket.close());
}
