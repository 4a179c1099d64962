// Prints the diagnostics of an AsyncAPI document as JSON: node asyncapi_parser.mjs PACKAGE FILE
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [, , where, file] = process.argv;
const { Parser } = createRequire(`${where}/`)("@asyncapi/parser");
const { document, diagnostics } = await new Parser().parse(readFileSync(file, "utf8"));
const found = diagnostics.map(({ severity, code, message, path }) => ({ severity, code, message, path }));
console.log(JSON.stringify({ messages: document ? document.messages().length : null, found }));
