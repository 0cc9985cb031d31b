// Builds the browser's modules: one self-contained ES module a widget, and the lab's plugin.
// Nothing is fetched at run time: the platform has no internet.
import { build } from "esbuild";
import { mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const { version } = JSON.parse(await readFile(join(here, "package.json"), "utf8"));
const common = {
  bundle: true,
  charset: "utf8",
  legalComments: "none",
  logLevel: "warning",
  minify: true,
  target: "es2022",
};

await build({
  ...common,
  entryPoints: ["cohort", "viewer", "clock", "traffic"].map((name) => join(here, "src", `${name}.ts`)),
  format: "esm",
  outdir: join(here, "..", "static"),
});
await build({
  ...common,
  entryPoints: [join(here, "src", "style.css")],
  outdir: join(here, "..", "static"),
});

// JupyterLab serves a plugin's files as never changing, so that their names carry their hash.
const lab = join(here, "..", "labextension", "kakehashi");
await rm(lab, { recursive: true, force: true });
const result = await build({
  ...common,
  entryPoints: { lab: join(here, "src", "lab.ts") },
  entryNames: "[name].[hash]",
  format: "iife",
  loader: { ".css": "text" },
  metafile: true,
  outdir: join(lab, "static"),
});
const [script] = Object.keys(result.metafile.outputs);
await mkdir(lab, { recursive: true });
await writeFile(
  join(lab, "package.json"),
  JSON.stringify(
    {
      name: "kakehashi",
      version,
      description: "Kakehashi's session clock, and downloads switched off",
      license: "BSD-3-Clause",
      jupyterlab: {
        _build: { load: `static/${basename(script)}`, extension: "./extension" },
        disabledExtensions: JSON.parse(
          await readFile(join(here, "disabled-plugins.json"), "utf8"),
        ),
      },
    },
    null,
    2,
  ),
);
