// Starts real applications on a sandbox's address, and looks at each through the ingress, as a browser does
// that has it in a frame of another site.
//
//   node run.mjs CONFIG.json [APPLICATION ...]
//
// CONFIG: ip (of the sandbox), edge (address of the TLS server in front of the ingress), host (of a port,
// with {port}), certificate (PEM file of the edge), parent (address for the page of the other site, which the
// edge serves as https://parent.test), without (applications that this Caddy does not pass on), links (by port: the
// link that begins a session, where a port needs one). Prints one line for each application; ends with 1 if one
// failed.
import https from "node:https";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import puppeteer from "puppeteer-core";
import { close, files, page as answerPage, serve } from "./apps/http.mjs";
import * as worker from "./apps/worker.mjs";

const APPLICATIONS = {
  framed: () => import("./apps/framed.mjs"),
  streams: () => import("./apps/streams.mjs"),
  grpc: () => import("./apps/grpc.mjs"),
  worker: () => Promise.resolve(worker),
  terminal: () => import("./apps/terminal.mjs"),
  vnc: () => import("./apps/vnc.mjs"),
  vite: () => import("./apps/vite.mjs"),
  next: () => import("./apps/next.mjs"),
  vscode: () => import("./apps/vscode.mjs"),
};

const [configFile, ...named] = process.argv.slice(2);
const config = JSON.parse(await readFile(configFile, "utf8"));
const [edgeIp, edgePort] = config.edge.split(":");
const [parentIp, parentPort] = config.parent.split(":");
const certificate = await readFile(config.certificate);
const dir = await mkdtemp(path.join(os.tmpdir(), "browser-"));

// All names are names of the edge.
const agent = new https.Agent({
  rejectUnauthorized: false,
  lookup: (_, options, done) => options.all
    ? done(null, [{ address: edgeIp, family: 4 }]) : done(null, edgeIp, 4),
});
const parentServer = await serve(parentIp, Number(parentPort), (request, response) =>
  request.url.startsWith("/socket.io-client/")
    ? files({ "socket.io-client": worker.client }, request, response)
    : answerPage(response, "<!doctype html><title>parent</title>"));
const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  headless: true,
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--ignore-certificate-errors",
    `--user-data-dir=${path.join(dir, "chromium")}`, `--host-resolver-rules=MAP * ${edgeIp}`],
});

let failed = 0;
for (const name of named.length ? named : Object.keys(APPLICATIONS)) {
  if (config.without?.includes(name)) {
    console.log(`NOT RUN ${name}: this Caddy does not pass it on`);
    continue;
  }
  const began = Date.now();
  try {
    await look(await APPLICATIONS[name]());
    console.log(`ok      ${name} (${Date.now() - began} ms)`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${name}: ${error.stack ?? error}`);
  }
}
await browser.close();
close(parentServer);
await rm(dir, { recursive: true, force: true });
process.exit(failed ? 1 : 0);

/** Starts one application, and looks at it. */
async function look(application) {
  const url = `https://${config.host.replace("{port}", application.port)}:${edgePort}`;
  const started = await application.start({ ip: config.ip, dir, url });
  const parent = await browser.newPage();
  try {
    await parent.goto(`https://parent.test:${edgePort}/`);
    const link = config.links?.[application.port];
    const framed = async (address) => {
      if (!link) return await inFrame(parent, address);
      await listens(application.port);
      const linked = new URL(address);
      linked.searchParams.set("sbx_link", link);
      return await inFrame(parent, linked.href);
    };
    await application.check({ parent, framed, url, started, agent, certificate, edge: edgeIp });
  } finally {
    await parent.close();
    await started.stop();
  }
}

/** Waits until an application listens: a link is answered whether it does or not. */
async function listens(port) {
  const deadline = Date.now() + 60_000;
  for (;;) {
    const open = await new Promise((done) => {
      const socket = net.connect(port, config.ip, () => done(true));
      socket.on("error", () => done(false)).on("connect", () => socket.destroy());
    });
    if (open) return;
    if (Date.now() > deadline) throw new Error(`nothing listens on port ${port}`);
    await new Promise((next) => setTimeout(next, 200));
  }
}

/** Opens an address in a frame of the parent's page; asks again while nothing listens yet. */
async function inFrame(parent, address) {
  const deadline = Date.now() + 60_000;
  for (;;) {
    const answer = await new Promise((done) => {
      https.get(address, { agent }, (response) => done(response.resume().statusCode)).on("error", () => done(0));
    });
    if (answer > 0 && answer < 500) break;
    if (Date.now() > deadline) throw new Error(`${address} answers ${answer}`);
    await new Promise((next) => setTimeout(next, 200));
  }
  const element = await parent.evaluateHandle((address) => {
    const frame = document.createElement("iframe");
    frame.src = address;
    frame.width = 1000;
    frame.height = 700;
    document.body.append(frame);
    return frame;
  }, address);
  return await element.contentFrame();
}
