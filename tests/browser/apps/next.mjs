// Next.js server actions: refused by Next when Origin and the forwarded host differ.
import { mkdir, symlink, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import path from "node:path";
import { program } from "./http.mjs";

export const port = 3000;
const modules = fileURLToPath(new URL("../node_modules", import.meta.url));

export async function start({ ip, dir }) {
  const root = path.join(dir, "next");
  await mkdir(path.join(root, "app"), { recursive: true });
  await symlink(modules, path.join(root, "node_modules"));
  await writeFile(path.join(root, "package.json"), `{ "private": true }`);
  await writeFile(path.join(root, "app", "layout.jsx"),
    `export default ({ children }) => <html><body>{children}</body></html>;`);
  await writeFile(path.join(root, "app", "actions.js"),
    `"use server"; export async function add(before, form) { return before + Number(form.get("n")); }`);
  await writeFile(path.join(root, "app", "page.jsx"),
    `"use client"; import { useActionState, useEffect, useState } from "react"; import { add } from "./actions";
     export default function Page() {
       const [sum, submit] = useActionState(add, 0);
       const [ready, setReady] = useState(false);
       useEffect(() => setReady(true), []);
       return <form action={submit}><input name="n" defaultValue="21" />
         <button id="add" disabled={!ready}>add</button><output>{sum}</output></form>;
     }`);
  const next = path.join(modules, "next", "dist", "bin", "next");
  const stop = program([next, "dev", "-H", ip, "-p", String(port)], {
    cwd: root, env: { ...process.env, NEXT_TELEMETRY_DISABLED: "1" },
  });
  return { stop };
}

export async function check({ framed, url }) {
  const frame = await framed(`${url}/`);
  await frame.waitForSelector("#add:not([disabled])", { timeout: 120_000 });
  await frame.click("#add");
  await frame.waitForFunction(
    () => document.querySelector("output").textContent === "21", { timeout: 60_000 });
}
