// A page that forbids frames and isolates itself, as editors and frameworks do by default.
import { close, page, serve } from "./http.mjs";

export const port = 8888;

const HEADERS = {
  "X-Frame-Options": "DENY",
  "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; script-src 'self'",
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Resource-Policy": "same-origin",
};

export async function start({ ip }) {
  const server = await serve(ip, port, (request, response) => {
    const { pathname } = new URL(request.url, "http://localhost");
    switch (pathname) {
      case "/own-cors":
        return page(response, "own", { "Access-Control-Allow-Origin": "https://only.test" });
      case "/no-cors":
        return page(response, "open");
      default:
        return page(response, `<!doctype html><p id="shown">shown</p><script>window.inline = true</script>`,
          HEADERS);
    }
  });
  return { stop: () => close(server) };
}

export async function check({ framed, parent, url }) {
  const frame = await framed(`${url}/`);
  await frame.waitForSelector("#shown", { timeout: 30_000 });
  // What a policy says of anything but frames stays.
  if (await frame.evaluate(() => window.inline === true)) {
    throw new Error("the policy for scripts was lost");
  }
  const read = (path) => parent.evaluate(
    (address) => fetch(address).then((answer) => answer.text(), () => "refused"), `${url}${path}`);
  const send = (path) => parent.evaluate(
    (address) => fetch(address, { method: "PUT", headers: { "X-Own": "1" } })
      .then((answer) => answer.text(), () => "refused"), `${url}${path}`);
  const answers = [await read("/no-cors"), await read("/own-cors"), await send("/no-cors"), await send("/own-cors")];
  if (answers.join() !== "open,refused,open,refused") {
    throw new Error(`across origins: ${answers}, instead of open,refused,open,refused`);
  }
}
