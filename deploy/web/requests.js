// What is sent to the server, what comes back, and the same request as code. Seeds reach 2^62, which JavaScript's
// numbers do not: they are BigInt here and are written into the JSON digit by digit.

/** What the server, or the way to it, said instead of an answer. */
export class RequestError extends Error {
  constructor(message, { status = 0, param = null, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter });
  }
}

/** A whole number as BigInt, another number as Number; any other text stays, for the server to explain. */
export function toNumber(text) {
  const trimmed = text.trim();
  if (/^-?\d+$/.test(trimmed)) return BigInt(trimmed);
  return trimmed !== "" && Number.isFinite(Number(trimmed)) ? Number(trimmed) : trimmed;
}

/** A flat body as JSON, with BigInt as digits. */
export function toJson(body) {
  const value = (item) => (Array.isArray(item) ? `[${item.map(value).join(", ")}]`
    : typeof item === "bigint" ? String(item) : JSON.stringify(item));
  return `{${Object.entries(body).map(([name, item]) => `${JSON.stringify(name)}: ${value(item)}`).join(", ")}}`;
}

/** Seconds that a Retry-After header asks for (a number or a date), or null. */
function secondsOf(header) {
  if (!header) return null;
  const seconds = Number.isNaN(Number(header)) ? (Date.parse(header) - Date.now()) / 1000 : Number(header);
  return Number.isFinite(seconds) ? Math.max(1, Math.ceil(seconds)) : null;
}

/** The server's refusal as a RequestError with its own words, whatever stands in front of it. */
async function explain(response) {
  const told = await response.json().then((body) => body.error, () => null);
  const words = told?.message ?? `The server answered ${response.status} ${response.statusText}`.trim();
  return new RequestError(words, {
    status: response.status, param: told?.param, code: told?.code,
    retryAfter: secondsOf(response.headers.get("Retry-After")),
  });
}

/** GETs, or POSTs a body: [answer, round trip in milliseconds]. Throws RequestError, or AbortError. */
export const call = (path, options = {}) => request(path, options, (response) => response.json());

/** POSTs a body with `stream`, and hands over each event's data: [nothing, round trip]. Throws like `call`. */
export const stream = (path, { body, ...options }, onEvent) => request(
  path, { body: { ...body, stream: true }, ...options }, (response) => readEvents(response, onEvent));

/** Reads server-sent events, which an empty line separates. */
async function readEvents(response, onEvent) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let text = "", chunk; !(chunk = await reader.read()).done;) {
      const blocks = (text + chunk.value).split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const data = JSON.parse(block.match(/^data: (.*)$/m)[1]);
        if (data.error) throw new RequestError(data.error.message, { status: 500, ...data.error });
        onEvent(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // after an error the server need not go on
  }
}

async function request(path, { body, key, signal }, read) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  const start = performance.now();
  try {
    const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && toJson(body), signal });
    if (!response.ok) throw await explain(response);
    return [await read(response), performance.now() - start];
  } catch (error) {
    if (error instanceof RequestError || error.name === "AbortError") throw error;
    throw new RequestError(`No answer from ${location.host}: it cannot be reached, or the connection broke.`);
  }
}

/** The bodies for POST v1/images/generations: one, or one for each number of steps that is compared. */
export function toBodies(settings, model) {
  const body = { model: model.id, prompt: settings.prompt, seed: settings.seed, response_format: "b64_json" };
  if (settings.mode === "generate") body.n = settings.numImages;
  if (settings.mode === "interpolate") Object.assign(body, { seed_end: settings.seedEnd, n: settings.numFrames });
  if (model.supports_guidance) {
    Object.assign(body, { guidance_scale: settings.guidanceScale, guidance_interval: settings.guidanceInterval });
  }
  if (settings.preview) body.preview = true;
  const steps = settings.mode === "steps" ? settings.compare : [settings.steps];
  return steps.map((num_inference_steps) => ({ ...body, num_inference_steps }));
}

/** A shell word: in single quotes. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The request as curl commands on /generate, whose answer is a PNG (several images are a grid). */
function asCurl(bodies, settings, base, hasKey) {
  return bodies.map((body) => {
    const { model, prompt, n, response_format, ...rest } = body;
    const sent = { class: settings.entry ? BigInt(settings.entry.id) : prompt, ...(n && { num_images: n }), ...rest };
    const lines = [
      `curl ${base}generate`,
      ...(hasKey ? ['  -H "authorization: Bearer $API_KEY"'] : []),
      "  -H 'content-type: application/json'",
      `  -d ${quoted(toJson(sent))}`,
      `  -o ${settings.slug}-${bodies.length > 1 ? `${body.num_inference_steps}-steps` : settings.seed ?? "random"}.png`,
    ];
    return lines.join(" \\\n");
  }).join("\n\n");
}

/** The request with OpenAI's Python client; what goes beyond its interface stands in extra_body. */
function asPython(bodies, settings, base, hasKey) {
  const { model, prompt, n, response_format, num_inference_steps, ...extra } = bodies[0];
  const many = bodies.length > 1;
  const python = (body) => toJson(body).replace(/\btrue\b/, "True");
  const steps = python({ num_inference_steps });
  const extras = `${python(extra).slice(0, -1)}${Object.keys(extra).length ? ", " : ""}${many ? '"num_inference_steps": steps}' : steps.slice(1)}`;
  const asked = [
    "answer = client.images.generate(",
    `    model=${JSON.stringify(model)}, prompt=${JSON.stringify(prompt)}, ${n ? `n=${n}, ` : ""}response_format="b64_json",`,
    `    extra_body=${extras},`,
    ")",
    "for index, image in enumerate(answer.data):",
    `    Path(f"${settings.slug}-${many ? "{steps}-steps-" : ""}{index}.png").write_bytes(base64.b64decode(image.b64_json))`,
  ];
  return [
    "import base64", ...(hasKey ? ["import os"] : []), "from pathlib import Path", "", "from openai import OpenAI", "",
    `client = OpenAI(base_url="${base}v1", api_key=${hasKey ? 'os.environ["API_KEY"]' : '"none"'})`,
    ...(many ? [`for steps in (${bodies.map((body) => body.num_inference_steps).join(", ")}):`] : []),
    ...asked.map((line) => (many ? `    ${line}` : line)),
  ].join("\n");
}

/** The request as code in a language, "curl" or "python". */
export function toSnippet(language, settings, model, base, hasKey) {
  const bodies = toBodies(settings, model).map((body) => {
    if (body.seed === undefined) delete body.seed;
    if (body.seed_end === undefined) delete body.seed_end;
    return body;
  });
  return (language === "curl" ? asCurl : asPython)(bodies, settings, base, hasKey);
}
