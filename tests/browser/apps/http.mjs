// Servers on Node's own http module, which several applications here stand on.
import http from "node:http";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFile } from "node:fs/promises";
import path from "node:path";

const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".mjs": "text/javascript; charset=utf-8",
  ".css": "text/css; charset=utf-8",
};

/** Starts a server with a handler. Returns it when it listens. */
export async function serve(ip, port, handler) {
  const server = http.createServer((request, response) => {
    Promise.resolve(handler(request, response)).catch((error) => {
      response.writeHead(500).end(String(error));
    });
  });
  server.listen(port, ip);
  await once(server, "listening");
  return server;
}

/** Answers with a file below one of the folders, by the first part of the path. */
export async function files(folders, request, response) {
  const { pathname } = new URL(request.url, "http://localhost");
  const [, first, ...rest] = pathname.split("/");
  const folder = folders[first];
  if (!folder || rest.includes("..")) {
    response.writeHead(404).end();
    return;
  }
  const file = path.join(folder, ...rest);
  const type = TYPES[path.extname(file)] ?? "application/octet-stream";
  try {
    const content = await readFile(file);
    response.writeHead(200, { "Content-Type": type }).end(content);
  } catch {
    response.writeHead(404).end();
  }
}

/** Answers with a page. */
export function page(response, html, headers = {}) {
  response.writeHead(200, { "Content-Type": TYPES[".html"], ...headers }).end(html);
}

/** Ends a server with its open connections. */
export function close(server) {
  server.closeAllConnections();
  server.close();
}

/** Starts a program of Node's. Returns a function that ends it with all that it started. */
export function program(args, options) {
  const child = spawn(process.execPath, args, {
    stdio: ["ignore", "ignore", "inherit"], detached: true, ...options,
  });
  return () => process.kill(-child.pid, "SIGKILL");
}
