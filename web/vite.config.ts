import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vite";
import { writesDigest } from "./building/digest.ts";

export default defineConfig({
  plugins: [svelte(), writesDigest()],
  build: {
    outDir: process.env.PAGE_FOLDER ?? "../chatserve/api/page",
    emptyOutDir: true,
    target: "es2022",
    // The content policy allows no inline script, and every browser of this target preloads.
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0,
    rollupOptions: { input: { index: "index.html", admin: "admin.html" } },
  },
  server: {
    proxy: { "/api": { target: "http://127.0.0.1:8000", ws: true }, "/v1": "http://127.0.0.1:8000", "/admin/": "http://127.0.0.1:8000" },
  },
});
