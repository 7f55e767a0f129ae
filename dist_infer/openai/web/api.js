// Calls to the server this page came from, with the key; and its errors, with what to do about them.

const KEY = "dist-infer.key";

/** A request that was refused, or that never arrived (status 0). */
export class Refused extends Error {
  constructor({ status = 0, message, advice = "", requestId = "", retryAfter = null }) {
    super(message);
    this.status = status;
    this.advice = advice;
    this.requestId = requestId;
    this.retryAfter = retryAfter;
  }
}

export function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

/** Kept until the tab is closed; an empty one is forgotten. */
export function keepKey(text) {
  if (text) sessionStorage.setItem(KEY, text);
  else sessionStorage.removeItem(KEY);
}

/** The response, once it is a good one. Refused otherwise; AbortError when `signal` says so. */
export async function ask(path, { body = null, signal = null } = {}) {
  let response;
  try {
    response = await fetch(path, {
      method: body === null ? "GET" : "POST",
      headers: {
        ...(body === null ? {} : { "content-type": "application/json" }),
        ...(key() ? { authorization: `Bearer ${key()}` } : {}),
      },
      body: body === null ? null : JSON.stringify(body),
      cache: "no-store",
      credentials: "omit",
      signal,
    });
  } catch (error) {
    throw isLost(error) ? unreachable() : error;
  }
  if (response.ok) return response;
  throw refusal(await errorOf(response), {
    status: response.status,
    requestId: response.headers.get("x-request-id") ?? "",
    retryAfter: Number(response.headers.get("retry-after")) || null,
  });
}

/** From OpenAI's error body, of a response or of a stream that had begun. */
export function refusal(error, { status = 0, requestId = "", retryAfter = null } = {}) {
  return new Refused({
    status,
    message: error.message ?? `the server answered with status ${status}`,
    advice: advice(error, status, requestId, retryAfter),
    requestId,
    retryAfter,
  });
}

export function unreachable() {
  return new Refused({
    message: "The server cannot be reached.",
    advice: "Check that it is running and that this machine has a way to it, then try again.",
  });
}

/** What a fetch throws when there was no answer, or the connection ended within it. */
export function isLost(error) {
  return error instanceof TypeError;
}

function advice(error, status, requestId, retryAfter) {
  const wait = retryAfter === null ? "in a moment" : `in ${retryAfter} s`;
  if (status === 401) return "Enter an API key that this server knows.";
  if (error.code === "context_length_exceeded") {
    return "Lower “Max tokens” in the settings, shorten the message, or start a new chat.";
  }
  if (error.code === "host_not_allowed") return "Open this page under a name that the server is set to answer to.";
  if (status === 400 && error.param) return `Change “${error.param}” in the settings, then send again.`;
  if (status === 400) return "Change the request, then send again.";
  if (status === 413) return "Shorten the conversation or start a new chat.";
  if (status === 429) return `The server is busy. Try again ${wait}.`;
  if (error.code === "loading") return "The model is still being loaded. This page becomes ready by itself.";
  if (error.code === "draining") return "The server is shutting down. Try again when it is back.";
  if (status === 503) return `Try again ${wait}.`;
  if (status === 504) return "The answer took longer than the server allows. Ask for fewer tokens.";
  if (status === 500) return `Whoever runs the server finds the reason in its log under ${requestId}.`;
  return "Try again.";
}

async function errorOf(response) {
  try {
    return (await response.json()).error ?? {};
  } catch {
    return {};
  }
}
