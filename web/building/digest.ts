// The digest of all that the page is built from, written into the built folder as `source.sha256`,
// so that whoever has no Node can tell whether the built page belongs to these sources
// (tests/web/test_built_page.py computes the same).
//
// Each file counts as one line, `<sha256 of its bytes>  <path>`, paths sorted as bytes; the digest
// is the SHA-256 of those lines.

import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { Plugin } from "vite";

const FOLDERS = ["src", "building"];
const FILES = /^(\.npmrc|[^.].*\.(html|json|js|ts))$/;

export function sources(root: string): string[] {
  const below = FOLDERS.flatMap((folder) =>
    readdirSync(join(root, folder), { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile())
      .map((entry) => join(entry.parentPath, entry.name).slice(root.length + 1)),
  );
  return [...readdirSync(root).filter((name) => FILES.test(name)), ...below].sort();
}

export function digest(root: string): string {
  const sha = (data: string | Buffer) => createHash("sha256").update(data).digest("hex");
  const lines = sources(root).map((path) => `${sha(readFileSync(join(root, path)))}  ${path}\n`);
  return sha(lines.join(""));
}

export function writesDigest(): Plugin {
  return {
    name: "writes-digest",
    generateBundle() {
      this.emitFile({
        type: "asset",
        fileName: "source.sha256",
        source: `${digest(import.meta.dirname.replace(/\/building$/, ""))}\n`,
      });
    },
  };
}
